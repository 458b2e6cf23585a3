"""The database: table definitions and sessions. SQL lives in repositories, schema changes in
`migrations`.
"""
