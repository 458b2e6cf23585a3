"""Usage per key, model and day: its SQL (`repository`). A trigger on `jobs` (migration 0007) writes
it.
"""
