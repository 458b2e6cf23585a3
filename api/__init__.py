"""The HTTP front end: accepts jobs, tells about them, speaks OpenAI's shapes. No torch, no model;
see `api.app`.
"""
