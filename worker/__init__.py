"""GPU workers: `worker.engine` decodes and knows no queue; the rest claims jobs, runs them and
records the end.
"""
