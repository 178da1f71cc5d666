"""Multifd's packets: their format, how pages are compressed in them, and compiled code for those that are not."""
