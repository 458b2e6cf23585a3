"""The vocabulary that the API and the workers have in common; no FastAPI, no Celery app, no torch."""
