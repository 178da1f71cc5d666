"""Streams that a QEMU saves by a command of its own."""

import time
from pathlib import Path

_SECONDS = 300


def saving(path: Path) -> str:
    """Where to migrate, so that the stream comes to be at `path`, whole."""
    return f"exec:cat > '{path}.part' && mv '{path}.part' '{path}'"


def saved(path: Path) -> bytes:
    """The stream. QEMU says that a migration has completed before the command has written the end of it."""
    end = time.monotonic() + _SECONDS
    while not path.exists():
        assert time.monotonic() < end, f"{path} is not written"
        time.sleep(0.001)
    return path.read_bytes()
