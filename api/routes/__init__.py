"""Native routes: jobs, models, health, metrics."""
