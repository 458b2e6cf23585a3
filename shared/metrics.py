"""Metrics of the API process; what the database knows (queues, jobs, workers) is read when `/metrics` is asked.

Names from the original design: vdiff_requests_total, vdiff_request_latency_seconds, vdiff_errors_total,
vdiff_tokens_generated_total (counted by the engines, carried here by the workers' heartbeats).
"""

from __future__ import annotations

from prometheus_client import Counter, Histogram

REQUESTS = Counter("vdiff_requests_total", "HTTP requests answered", ["method", "route", "status"])
LATENCY = Histogram(
    "vdiff_request_latency_seconds",
    "Time from request to the end of the answer, seconds",
    ["route"],
    buckets=(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300),
)
ERRORS = Counter("vdiff_errors_total", "Error answers by code", ["code"])
