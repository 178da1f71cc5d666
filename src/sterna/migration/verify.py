"""Verification: the digests of guest RAM on the wire, their comparison, and the page that differs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import xxhash

from sterna.memory.address import PAGE_SIZE, PAGES_PER_PMD
from sterna.memory.digest import BlockDigest, Digests, RamDigest, chunk_count, page_digests
from sterna.memory.ram import RamBlock
from sterna.migration.transport.work import SentPages
from sterna.stream.body import ByteSource
from sterna.stream.fields import Field, Record
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    counted_array,
    counted_buffer,
    struct,
    u32,
    u64,
)
from sterna.stream.wire import NAME_LIMIT, RAM_BLOCK_LIMIT

_CHUNK_LIMIT = 1 << 23
"""Chunks of one block that are sent: 16 TiB of RAM."""


@dataclass(frozen=True)
class _Bound(Field):
    """No bytes: checks what was read so far, before room is made for what it counts.

    :ivar check: returns what is wrong, or nothing
    """

    valued: ClassVar[bool] = False

    check: Callable[[Record], str]

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        pass

    def read(self, source: ByteSource, record: Record) -> None:
        if wrong := self.check(record):
            raise StreamError(wrong, source.section, source.offset)

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        return []


def _section(
    check_count: Callable[[Record], str], check_block: Callable[[Record], str]
) -> VmStateDescription:
    block = VmStateDescription(
        "sterna/ram-digest-block",
        1,
        (
            u32("name_bytes"),
            counted_buffer("name", counted_by="name_bytes", limit=NAME_LIMIT),
            u64("size"),
            u32("chunk_count"),
            _Bound("block", check_block),
            counted_array(u64("chunks"), counted_by="chunk_count", limit=_CHUNK_LIMIT, as_numpy=True),
        ),
    )
    return VmStateDescription(
        "sterna/ram-digest",
        1,
        (
            u64("devices"),
            u64("root"),
            u32("block_count"),
            _Bound("count", check_count),
            counted_array(struct("blocks", block), counted_by="block_count", limit=RAM_BLOCK_LIMIT),
        ),
    )


SECTION = _section(lambda record: "", lambda record: "")
"""The section that carries digests. It only goes to a sterna that agreed, or into a one-way stream on
request.
"""


def section_for(blocks: Sequence[RamBlock]) -> VmStateDescription:
    """The section as a machine with this RAM reads it: digests of any other RAM are refused before they are
    read, so that no more is read than the machine's own digests take.
    """
    sizes = {block.name.encode(): block.size for block in blocks}

    def check_count(record: Record) -> str:
        count = record["block_count"]
        return "" if count == len(sizes) else f"digests of {count} RAM blocks; there are {len(sizes)} here"

    def check_block(record: Record) -> str:
        name, size, count = bytes(record["name"]), record["size"], record["chunk_count"]
        shown = repr(name.decode("utf-8", "backslashreplace"))
        if name not in sizes:
            return f"digests of RAM block {shown:.100}, which does not exist here"
        if size != sizes[name]:
            return f"RAM block {shown} has {size:#x} bytes at the source, {sizes[name]:#x} here"
        if count != chunk_count(size):
            return f"{count} digests of RAM block {shown}, which has {chunk_count(size)} chunks"
        return ""

    return _section(check_count, check_block)


def devices_digest(devices: Iterable[tuple[DeviceState, bytes]]) -> int:
    """XXH3-64 over all device sections in order: name, instance, version, and body.

    :param devices: each with its body as it is encoded
    """
    state = xxhash.xxh3_64()
    for device, body in devices:
        state.update(f"{device.name}\0{device.instance_id}\0{device.version}\0{len(body)}\0".encode() + body)
    return int(state.intdigest())


def to_state(digest: RamDigest, devices: int) -> DeviceState:
    """The section's values.

    :param devices: what `devices_digest` says
    """
    blocks: list[dict[str, Any]] = []
    for block in digest.blocks:
        name = block.block.encode()
        blocks.append(
            {
                "name_bytes": len(name),
                "name": name,
                "size": block.size,
                "chunk_count": block.chunks.size,
                "chunks": block.chunks,
            }
        )
    values = {"devices": devices, "root": digest.root, "block_count": len(blocks), "blocks": blocks}
    return DeviceState(SECTION.name, 0, 1, values)


def from_state(state: DeviceState) -> tuple[RamDigest, int]:
    """What a decoded section says: the digest of RAM, and that of the devices.

    :raise StreamError: When the root is not that of the chunks' digests: the section itself was damaged.
    """
    digest = RamDigest(
        tuple(
            BlockDigest(
                bytes(block["name"]).decode("utf-8", "backslashreplace"),
                block["size"],
                np.asarray(block["chunks"], dtype=np.uint64),
            )
            for block in state.fields["blocks"]
        )
    )
    if digest.root != state.fields["root"]:
        raise StreamError("the digests do not add up to their own root", SECTION.name)
    return digest, state.fields["devices"]


@dataclass(frozen=True)
class DigestMismatch:
    """The first chunk whose digest differs.

    :ivar chunk: -1 when the blocks themselves differ in name or size
    """

    block: str
    chunk: int

    def __str__(self) -> str:
        if self.chunk < 0:
            return f"RAM block {self.block!r} is not on both sides with the same size"
        first = self.chunk * PAGES_PER_PMD
        return f"RAM block {self.block!r}, pages {first} to {first + PAGES_PER_PMD - 1} differ"


def compare(theirs: RamDigest, ours: RamDigest) -> DigestMismatch | None:
    """The first difference, or None when all of RAM is equal."""
    by_name = {block.block: block for block in theirs.blocks}
    for block in ours.blocks:
        other = by_name.get(block.block)
        if other is None or other.size != block.size or other.chunks.shape != block.chunks.shape:
            return DigestMismatch(block.block, -1)
        different = np.flatnonzero(other.chunks != block.chunks)
        if different.size:
            return DigestMismatch(block.block, int(different[0]))
    if len(theirs.blocks) != len(ours.blocks):
        return DigestMismatch(
            next(name for name in by_name if name not in {b.block for b in ours.blocks}), -1
        )
    return None


def locate(
    blocks: Sequence[RamBlock], block_name: str, chunk: int, theirs: bytes, sent_pages: SentPages
) -> str:
    """Which pages of a chunk differ, by the destination's page digests, and which pass sent them last.

    :param theirs: digests of the chunk's pages, big-endian uint64
    :return: one line that names block, pages and passes
    """
    differs = "guest RAM differs at the destination"
    block = next((block for block in blocks if block.name == block_name), None)
    if block is None or not 0 <= chunk * PAGES_PER_PMD < block.pages:
        return f"{differs}, in a place that does not exist: block {block_name!r:.100}, chunk {chunk}"
    ours: Digests = page_digests(block, chunk)
    if len(theirs) != ours.size * 8:
        return f"{differs}: {DigestMismatch(block_name, chunk)}"
    different = np.flatnonzero(ours != np.frombuffer(theirs, dtype=">u8"))
    if not different.size:
        return f"{differs}: {DigestMismatch(block_name, chunk)}, but page by page they are equal"
    pages = [int(page) + chunk * PAGES_PER_PMD for page in different]
    shown = ", ".join(
        f"{page} (last sent in pass {sent_pages.pass_of(block_name, page)})" for page in pages[:4]
    )
    more = f" and {len(pages) - 4} more" if len(pages) > 4 else ""
    return (
        f"{differs}: RAM block {block_name!r}, page {shown}{more}; first at offset {pages[0] * PAGE_SIZE:#x}"
    )
