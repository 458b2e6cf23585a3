"""API keys: how one looks (`tokens`), what it may do (`principal`), and its rows (`repository`)."""
