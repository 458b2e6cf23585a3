"""Webhooks, as Standard Webhooks has them; `worker.delivery` sends them.

`events` has bodies and signatures, `targets` the guard against SSRF, `requests` what clients may
ask, `repository` the SQL.
"""
