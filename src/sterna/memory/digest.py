"""Digests of guest RAM: one per 2 MiB chunk, and a root over all of them.

A chunk's digest is XXH3-64 of its bytes. The root is XXH3-64 over each block's name and size and its chunks'
digests in order, so equal chunks at different places give different roots. Digests find accidents, not
forgers.

Memory that was never touched is not read, because reading would populate it: a chunk without a single page in
/proc/self/pagemap (Linux, Documentation/admin-guide/mm/pagemap.rst) has the digest of zeros.
"""

import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE, PAGES_PER_PMD, PMD_SIZE
from sterna.memory.ram import RamBlock

CHUNK_SIZE = PMD_SIZE
"""Bytes per chunk: what a transparent huge page holds, so a chunk is populated in whole or not at all."""

_SAMPLES = 8

Digests = NDArray[np.uint64]

_PRESENT_OR_SWAPPED = np.uint64(0b11 << 62)


def chunk_count(size: int) -> int:
    """Number of chunks in so many bytes; the last may be short."""
    return (size + CHUNK_SIZE - 1) // CHUNK_SIZE


@dataclass(frozen=True)
class BlockDigest:
    """Digests of one RAM block.

    :ivar chunks: shape `(chunk_count(size),)`, dtype uint64
    """

    block: str
    size: int
    chunks: Digests

    @property
    def hex(self) -> str:
        """The root of RAM that has this block only, as 16 hexadecimal digits."""
        return RamDigest((self,)).hex

    @classmethod
    def join(cls, parts: "Sequence[BlockDigest]") -> "BlockDigest":
        """The digest of a block from those of its parts; each but the last must be whole chunks long."""
        chunks = np.concatenate([part.chunks for part in parts])
        return cls(parts[0].block, sum(part.size for part in parts), chunks)


@dataclass(frozen=True)
class RamDigest:
    """Digests of all guest RAM, blocks in the guest's order."""

    blocks: tuple[BlockDigest, ...]

    @property
    def root(self) -> int:
        """One 64-bit number for all of RAM."""
        state = xxhash.xxh3_64()
        for block in self.blocks:
            state.update(block.block.encode() + b"\0" + block.size.to_bytes(8, "big"))
            state.update(block.chunks.astype(">u8").tobytes())
        return int(state.intdigest())

    @property
    def hex(self) -> str:
        """The root as 16 hexadecimal digits."""
        return f"{self.root:016x}"


def populated_chunks(block: RamBlock) -> NDArray[np.bool_]:
    """Which chunks have memory of their own behind them: shape `(chunks,)`.

    All of them where the kernel does not tell. The answer is a snapshot; a chunk may be populated right after
    it.
    """
    chunks = chunk_count(block.size)
    try:
        fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return np.ones(chunks, dtype=np.bool_)
    try:
        entries = np.zeros(chunks * PAGES_PER_PMD, dtype=np.uint64)
        raw = entries.view(np.uint8).data[: block.pages * 8]
        done = 0
        while done < len(raw):
            got = os.preadv(fd, [raw[done:]], (block.hva >> PAGE_SHIFT) * 8 + done)
            if got <= 0:
                return np.ones(chunks, dtype=np.bool_)
            done += got
    except OSError:
        return np.ones(chunks, dtype=np.bool_)
    finally:
        os.close(fd)
    return np.asarray((entries & _PRESENT_OR_SWAPPED).reshape(chunks, PAGES_PER_PMD).any(axis=1))


def chunk_digest(block: RamBlock, chunk: int) -> int:
    """Digest of one chunk."""
    return int(xxhash.xxh3_64_intdigest(block.data[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE].data))


def digest_file(name: str, file: BinaryIO) -> BlockDigest:
    """Digest a file that holds the bytes of a RAM block, as QEMU's pmemsave writes it.

    :raise OSError: When it cannot be read.
    """
    size = 0
    digests: list[int] = []
    while chunk := file.read(CHUNK_SIZE):
        size += len(chunk)
        digests.append(xxhash.xxh3_64_intdigest(chunk))
    return BlockDigest(name, size, np.array(digests, dtype=np.uint64))


def page_digests(block: RamBlock, chunk: int) -> Digests:
    """Digests of a chunk's pages, shape `(512,)` or fewer at the block's end: which page differs?"""
    pages = block.data[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE].reshape(-1, PAGE_SIZE)
    return np.array([xxhash.xxh3_64_intdigest(page.data) for page in pages], dtype=np.uint64)


def digest_ram(
    blocks: Sequence[RamBlock], *, threads: int = 2, check: Callable[[], None] = lambda: None
) -> RamDigest:
    """Digest all of `blocks`; nobody may write to them meanwhile.

    :param check: called between chunks; what it raises (a cancellation) ends the work
    """
    results: list[BlockDigest] = []
    work: list[tuple[RamBlock, Digests, NDArray[np.int64]]] = []
    for block in blocks:
        digests = _untouched(block.size)
        populated = np.flatnonzero(populated_chunks(block))
        results.append(BlockDigest(block.name, block.size, digests))
        work += [(block, digests, populated[first::threads]) for first in range(threads)]

    def run(part: tuple[RamBlock, Digests, NDArray[np.int64]]) -> None:
        block, digests, chunks = part
        for chunk in chunks:
            check()
            digests[chunk] = chunk_digest(block, int(chunk))

    with ThreadPoolExecutor(threads, thread_name_prefix="digest") as pool:
        for _ in pool.map(run, work):
            pass
    return RamDigest(tuple(results))


def _untouched(size: int) -> Digests:
    """Digests of a block that holds nothing but zeros."""
    digests = np.full(chunk_count(size), xxhash.xxh3_64_intdigest(bytes(CHUNK_SIZE)), dtype=np.uint64)
    if size % CHUNK_SIZE:
        digests[-1] = xxhash.xxh3_64_intdigest(bytes(size % CHUNK_SIZE))
    return digests


def digest_cost_seconds(blocks: Sequence[RamBlock]) -> float:
    """How long `digest_ram` would take now, rather too much than too little.

    A few populated chunks are measured on one thread and the others counted; a second thread gains less than
    half.
    """
    total = 0
    samples: list[tuple[RamBlock, int]] = []
    for block in blocks:
        populated = np.flatnonzero(populated_chunks(block))
        total += int(populated.size)
        samples += [(block, int(chunk)) for chunk in populated[:: max(1, populated.size // _SAMPLES)]]
    if not samples:
        return 0.0
    started = time.perf_counter()
    for block, chunk in samples:
        chunk_digest(block, chunk)
    return (time.perf_counter() - started) * total / len(samples)
