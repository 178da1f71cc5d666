"""Dirty page logging and live migration for virtual machines."""

__version__ = "0.1.0"
