"""Compiled kernels between page numbers and memory. Callers have checked the numbers."""

from typing import Annotated, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import READONLY, Late, kernel
from sterna.memory.bitmap import PageNumbers, Words
from sterna.memory.content import Bytes, copy, is_zero
from sterna.memory.vectors import Vectors
from sterna.stream.multifd.format import COUNT_AT, HEAD_BYTES, MAGIC, NAME_AT, NUMBER_AT, SIZE_AT, VERSION

stack_words: Any = Late("sterna.jit.intrinsics:stack_words")

_HEAD_WORDS = 6
"""32-bit integers that a header begins with: magic, version, flags, room for pages, pages, bytes of data."""


@kernel(ahead=False)
def put(data: Bytes, at: int, size: int, value: int) -> None:
    """Write a big-endian integer."""
    for i in range(size):
        data[at + i] = np.uint8((value >> (8 * (size - 1 - i))) & 0xFF)


@kernel(ahead=False)
def fetch(data: Bytes, at: int, size: int) -> int:
    """Read a big-endian integer of up to 8 bytes; one past 2**63 is negative in compiled code."""
    value = 0
    for i in range(size):
        value = value << 8 | int(data[at + i])
    return value


@kernel()
def split_zero(
    words: Words, pages: PageNumbers, page_bits: int, zero: PageNumbers, whole: PageNumbers
) -> int:
    """Find the pages that are all zero.

    :param words: the block's bytes as 64-bit words
    :param pages: numbers in the block
    :param zero: where those that are zero go, in order; as long as `pages`
    :param whole: where the others go
    :return: how many are zero
    """
    per_page = 1 << (page_bits - 3)
    zeros = 0
    for i in range(pages.size):
        if is_zero(words, pages[i] * per_page, per_page):
            zero[zeros] = pages[i]
            zeros += 1
        else:
            whole[i - zeros] = pages[i]
    return zeros


@kernel()
def gather_pages(
    pages: PageNumbers, hva: int, page_bits: int, sources: Vectors, vectors: Vectors, row: int
) -> int:
    """The memory of pages as a gather list; pages that follow each other are one piece.

    :param hva: address of page 0
    :param sources: where the pages are instead, one row for each, or empty
    :param vectors: where the list goes, from `row` on; with room for a row for each page
    :return: the row after it
    """
    if len(sources):
        for i in range(len(sources)):
            vectors[row, 0] = sources[i, 0]
            vectors[row, 1] = sources[i, 1]
            row += 1
        return row
    for i in range(pages.size):
        if i > 0 and pages[i] == pages[i - 1] + 1:
            vectors[row - 1, 1] += np.uint64(1 << page_bits)
        else:
            vectors[row, 0] = np.uint64(hva) + np.uint64(pages[i] << page_bits)
            vectors[row, 1] = 1 << page_bits
            row += 1
    return row


LAYOUT = np.dtype([(name, np.int64) for name in ("page_bits", "number", "block", "headers")])
"""How packets are laid out: log2 of the stream's page size, number of the first packet, addresses of the block's first byte
and of the headers.
"""

Layout: TypeAlias = Annotated[NDArray[Any], LAYOUT]
"""`shape (1,)`"""


def _put_offsets_twin(header: Bytes, pages: PageNumbers, page_bits: int) -> None:
    header[HEAD_BYTES : HEAD_BYTES + 8 * pages.size].view(">u8")[:] = pages << page_bits


@kernel(twin=_put_offsets_twin, ahead=False, inline=True)
def _put_offsets(header: Bytes, pages: PageNumbers, page_bits: int) -> None:
    """Write the offsets of a packet's pages."""
    for i in range(pages.size):
        put(header, HEAD_BYTES + 8 * i, 8, pages[i] << page_bits)


@kernel()
def lay_out(
    layout: Layout,
    pages: PageNumbers,
    sources: Vectors,
    head: Bytes,
    headers: Annotated[NDArray[np.uint8], 2],
    vectors: Vectors,
) -> int:
    """Packets of pages that are not compressed: their headers, and a gather list of all of them.

    :param sources: as in `gather_pages`
    :param head: a header up to its pages, `shape (HEAD_BYTES,)`; what depends on the packet is put in
    :param headers: where the headers go, one row for each packet, zeros before
    :param vectors: where the list goes; with room for a row for each page and each packet
    :return: its length
    """
    row = 0
    page_bits = layout[0]["page_bits"]
    per_packet = (headers.shape[1] - HEAD_BYTES) // 8
    for packet in range(len(headers)):
        first = packet * per_packet
        some = pages[first : first + per_packet]
        header = headers[packet]
        copy(header[:HEAD_BYTES], head)
        put(header, COUNT_AT, 4, some.size)
        put(header, SIZE_AT, 4, some.size << page_bits)
        put(header, NUMBER_AT, 8, layout[0]["number"] + packet)
        _put_offsets(header, some, page_bits)
        vectors[row, 0] = layout[0]["headers"] + packet * headers.shape[1]
        vectors[row, 1] = headers.shape[1]
        row = gather_pages(
            some, layout[0]["block"], page_bits, sources[first : first + per_packet], vectors, row + 1
        )
    return row


@kernel(ahead=False)
def mark(bitmap: Words, pages: PageNumbers) -> None:
    """Set the bits of pages."""
    for i in range(pages.size):
        bitmap[pages[i] >> 6] |= np.uint64(1) << np.uint64(pages[i] & 63)


@kernel()
def place(data: Annotated[Bytes, READONLY], pages: PageNumbers, page_bits: int, ram: Bytes) -> None:
    """Copy pages that lie one after the other to their places in a block."""
    size = 1 << page_bits
    for i in range(pages.size):
        copy(ram[pages[i] * size : (pages[i] + 1) * size], data[i * size : (i + 1) * size])


@kernel(ahead=False)
def plain_pages(header: Bytes, name: Bytes, page_bits: int, limit: int, pages: PageNumbers) -> int:
    """The pages of a packet as most are: not compressed, without SYNC, all of them in the given block.

    :param name: the block's, with the NUL that ends it
    :param limit: the block's pages
    :param pages: where their numbers go; as long as a packet of this page size can have
    :return: how many; 0 when the packet is another, or none that is valid
    """
    # In a loop: with each place as a constant, each call would be compiled by itself.
    words = stack_words(_HEAD_WORDS)
    for i in range(words.size):
        words[i] = fetch(header, 4 * i, 4)
    magic, version, flags = words[0], words[1], words[2]
    room, count, size = words[3], words[4], words[5]
    if magic != MAGIC or version != VERSION or flags != 0:
        return 0
    if not 0 < count <= room <= pages.size or size != count << page_bits:
        return 0
    for i in range(name.size):
        if header[NAME_AT + i] != name[i]:
            return 0
    for i in range(count):
        offset = fetch(header, HEAD_BYTES + 8 * i, 8)
        page = offset >> page_bits
        if page < 0 or page >= limit or page << page_bits != offset:
            return 0
        pages[i] = page
    return int(count)
