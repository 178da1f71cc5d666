"""Inputs of several byte strings in one file."""

from pathlib import Path

Parts = list[bytes]


def pack(parts: Parts) -> bytes:
    """Each part after its length in four bytes."""
    return b"".join(len(part).to_bytes(4, "big") + part for part in parts)


def unpack(data: bytes) -> Parts:
    parts = []
    while data:
        size = int.from_bytes(data[:4], "big")
        parts.append(data[4 : 4 + size])
        data = data[4 + size :]
    return parts


def load(path: Path) -> Parts:
    return unpack(path.read_bytes())
