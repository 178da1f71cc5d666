"""The list of RAM blocks that a ``ram`` section begins with, and what names a block in its records."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from sterna.memory.address import PAGE_SHIFT
from sterna.stream.reader import StreamReader
from sterna.stream.wire import (
    NAME_LIMIT,
    RAM_BLOCK_LIMIT,
    RamFlag,
    StreamError,
    StreamUnsupported,
)

END_OF_RECORDS = int(RamFlag.EOS).to_bytes(8, "big")
"""Ends the body of each part of the section."""
_MULTIFD_FLUSH = int(RamFlag.MULTIFD_FLUSH).to_bytes(8, "big")
_Block = TypeVar("_Block")
MULTIFD_FLUSH_TEXT = "a flush of multifd channels; those of QEMU 8 and later cannot be read"


def ram_setup(blocks: Sequence[tuple[str, int]]) -> bytes:
    """Body of the section's first part: the names and sizes (bytes) of all RAM blocks.

    :raise StreamError: When a name is empty or too long.
    """
    total = sum(size for _, size in blocks)
    out = bytearray((total | RamFlag.MEM_SIZE).to_bytes(8, "big"))
    for name, size in blocks:
        out += wire_name(name) + size.to_bytes(8, "big")
    return bytes(out) + END_OF_RECORDS


def read_setup(reader: StreamReader, page_bits: int = PAGE_SHIFT) -> list[tuple[str, int]]:
    """Read the body of the section's first part.

    :return: name and size in bytes of each block
    :raise StreamError: When it is not a list of RAM blocks whose sizes give the total.
    """
    at = reader.offset
    word = int.from_bytes(reader.take(8), "big")
    page_mask = (1 << page_bits) - 1
    if word & page_mask != RamFlag.MEM_SIZE:
        raise reader.error(
            f"a list of RAM blocks belongs here, not a record with flags {word & page_mask:#x}", at
        )
    total = left = word & ~page_mask
    blocks: list[tuple[str, int]] = []
    while left:
        at = reader.offset
        raw = reader.take(reader.take(1)[0])
        name = raw.decode("utf-8", "backslashreplace")
        if not _is_name(raw, name):
            raise reader.error(f"RAM block {name!r}: a name is 1 to {NAME_LIMIT} bytes of UTF-8", at)
        size = int.from_bytes(reader.take(8), "big")
        if size == 0 or size & page_mask or size > left:
            raise reader.error(f"RAM block {name!r} has {size:#x} bytes of the {total:#x} in all", at)
        if name in dict(blocks):
            raise reader.error(f"RAM block {name!r} is listed twice", at)
        if len(blocks) >= RAM_BLOCK_LIMIT:
            raise reader.error(f"more than {RAM_BLOCK_LIMIT} RAM blocks", at)
        blocks.append((name, size))
        left -= size
    at = reader.offset
    end = reader.take(8)
    if end == _MULTIFD_FLUSH:
        raise StreamUnsupported(MULTIFD_FLUSH_TEXT, reader.section, at)
    if end != END_OF_RECORDS:
        raise reader.error("the list of RAM blocks does not end where its sizes add up", at)
    return blocks


def named_block(reader: StreamReader, blocks: Mapping[str, _Block]) -> _Block:
    """The block that the record at hand names: exactly so, or a kernel that looks for its records would never find the first.

    :param blocks: by their names
    :raise StreamError: When there is no such block.
    """
    raw = reader.peek(9 + reader.peek(9)[8])[9:]
    name = raw.decode("utf-8", "backslashreplace")
    if name not in blocks or not _is_name(raw, name):
        raise reader.error(f"a page of RAM block {name!r}, which is not in the list of RAM blocks")
    return blocks[name]


def _is_name(raw: bytes, name: str) -> bool:
    """Whether a name on the wire is one: not empty, and the only bytes that are read as `name`."""
    return bool(raw) and name.encode() == raw


def wire_name(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) <= NAME_LIMIT:
        raise StreamError(f"RAM block {name!r}: a name has 1 to {NAME_LIMIT} bytes")
    return bytes((len(raw),)) + raw
