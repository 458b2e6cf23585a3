"""Names and messages of the Redis queues. Redis is a hint that makes it fast; queued rows are the
jobs' outbox.
"""
