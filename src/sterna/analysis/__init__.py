"""Streams that are only looked at: what is in one, how two differ, and, in `proxy/`, those that pass by.

Nothing here is needed to migrate.
"""
