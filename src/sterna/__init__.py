"""Dirty page logging and live migration for virtual machines."""

import time

__version__ = "0.1.0"

STARTED = time.time()
"""Before any other source file of this package was read."""
