"""Migrations of VM processes, watched from outside by `query-migrate`."""

FINAL = ("completed", "failed", "cancelled")
"""Statuses of query-migrate that do not change any more."""
