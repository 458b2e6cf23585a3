"""What was used, per key, model and day: its SQL (`repository`); written by a trigger on `jobs` (migration 0007)."""
