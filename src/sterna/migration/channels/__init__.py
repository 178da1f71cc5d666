"""Channels that carry a migration stream: one module per kind of URI."""
