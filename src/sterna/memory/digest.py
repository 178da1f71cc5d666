"""Digests of guest RAM: one per 128 KiB piece, one per 2 MiB chunk over its pieces', and a root over all of them.

A piece's digest is XXH3-64 of its bytes, a chunk's XXH3-64 of its pieces' digests, big-endian, in order. The root is
XXH3-64 over each block's name and size and its chunks' digests in order, so equal chunks at different places give
different roots. Digests find accidents, not forgers.

Chunks are what two ends compare. Pieces are what need not be read again because a few pages nearby were written
(`sterna.memory.rollingdigest`).

Memory that was never touched is not read, because reading would populate it: a piece without a single page that the host has
memory for (`sterna.memory.populated`) has the digest of zeros.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from sterna.memory.address import PAGE_SIZE, PAGES_PER_PMD, PMD_SIZE
from sterna.memory.populated import populated
from sterna.memory.ram import RamBlock

CHUNK_SIZE = PMD_SIZE
"""Bytes per chunk."""
PIECE_SHIFT = 17
PIECE_SIZE = 1 << PIECE_SHIFT
"""Bytes per piece: so large that a digest costs little more than its bytes and xxhash lets go of the GIL meanwhile (from
100,000 bytes on), so small that a page spoils few of them.
"""
PIECES_PER_CHUNK = CHUNK_SIZE // PIECE_SIZE
_PAGES_PER_PIECE = PIECE_SIZE // PAGE_SIZE

Digests = NDArray[np.uint64]


def chunk_count(size: int) -> int:
    """Number of chunks in so many bytes; the last may be short."""
    return (size + CHUNK_SIZE - 1) // CHUNK_SIZE


def piece_count(size: int) -> int:
    """Number of pieces in so many bytes; the last may be short."""
    return (size + PIECE_SIZE - 1) // PIECE_SIZE


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
    """Which chunks have memory of their own behind them: shape `(chunk_count(block.size),)`.

    As `populated` tells it.
    """
    return populated(block, 0, block.pages, PAGES_PER_PMD)


def populated_pieces(block: RamBlock, first: int = 0, count: int | None = None) -> NDArray[np.bool_]:
    """The same of `count` pieces from `first` on: shape `(count,)`; None: to the block's end."""
    start = first * _PAGES_PER_PIECE
    end = block.pages if count is None else min(block.pages, start + count * _PAGES_PER_PIECE)
    return populated(block, start, end, _PAGES_PER_PIECE)


def piece_digest(block: RamBlock, piece: int) -> int:
    """Digest of one piece."""
    return int(xxhash.xxh3_64_intdigest(block.data[piece << PIECE_SHIFT : (piece + 1) << PIECE_SHIFT].data))


def chunk_digest(pieces: Digests) -> int:
    """Digest of a chunk with these pieces, shape `(PIECES_PER_CHUNK,)` or fewer at the block's end."""
    return int(xxhash.xxh3_64_intdigest(pieces.astype(">u8").tobytes()))


@cache
def zero_piece(size: int = PIECE_SIZE) -> int:
    """Digest of a piece of so many bytes that are all zero."""
    return int(xxhash.xxh3_64_intdigest(bytes(size)))


def digest_file(name: str, file: BinaryIO) -> BlockDigest:
    """Digest a file that holds the bytes of a RAM block, as QEMU's pmemsave writes it.

    :raise OSError: When it cannot be read.
    :raise ValueError: When no RAM block has its size.
    """
    size = 0
    digests: list[int] = []
    while chunk := memoryview(file.read(CHUNK_SIZE)):
        size += len(chunk)
        pieces = [
            xxhash.xxh3_64_intdigest(chunk[at : at + PIECE_SIZE]) for at in range(0, len(chunk), PIECE_SIZE)
        ]
        digests.append(chunk_digest(np.array(pieces, dtype=np.uint64)))
    if not size:
        raise ValueError("the file is empty")
    if size % PAGE_SIZE:
        raise ValueError(f"{size} bytes are not whole pages of {PAGE_SIZE} bytes, as a RAM block's are")
    return BlockDigest(name, size, np.array(digests, dtype=np.uint64))


def page_digests(block: RamBlock, chunk: int) -> Digests:
    """Digests of a chunk's pages, shape `(512,)` or fewer at the block's end: which page differs?"""
    pages = block.data[chunk * CHUNK_SIZE : (chunk + 1) * CHUNK_SIZE].reshape(-1, PAGE_SIZE)
    return np.array([xxhash.xxh3_64_intdigest(page.data) for page in pages], dtype=np.uint64)
