"""Files of tenants: their rows (repository), their content (store, objects), and what a request
does with them (service).
"""
