"""Webhooks, as Standard Webhooks has them."""
