"""Pages of guest RAM as records, with the pages where they are: see `sterna.stream.ram`."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.memory.address import PAGE_SHIFT
from sterna.memory.bitmap import PageNumbers
from sterna.memory.ram import RamBlock
from sterna.stream.ram import records
from sterna.stream.ram.records import bytes_array, record_head
from sterna.stream.ram.setup import wire_name
from sterna.stream.wire import RamFlag

BATCH_PAGES = 2048
"""Most pages encoded and handed over at once: 8 MiB, which stay in the processor's last cache between the look for zeros and
the system call.
"""


@dataclass(frozen=True)
class Batch:
    """Pages of one block, ascending.

    :ivar untouched: the host has no memory behind any of them, so they are zeros and need not be looked at
    """

    block: RamBlock
    pages: PageNumbers
    untouched: bool = False


@dataclass(frozen=True)
class EncodedPages:
    """Pages as records, ready for a vectored system call (`writev`, `sendmsg`).

    The page data is not in it but referred to where it is, in guest RAM; what is sent is what is there when
    the system call reads it.

    :ivar iov: `shape (n, 2)`, dtype uint64: address and length of each piece, as an array of `struct iovec`
    :ivar nbytes: bytes on the wire
    :ivar normal: records that carry a page
    :ivar duplicate: records of pages that are all zero
    :ivar keepalive: what the addresses point into
    """

    iov: NDArray[np.uint64]
    nbytes: int
    normal: int
    duplicate: int
    keepalive: tuple[object, ...]

    def tobytes(self) -> bytes:
        """A copy of the bytes on the wire; for tests and slow channels."""
        return b"".join(records.bytes_at(int(address), int(size)) for address, size in self.iov)


def encode_pages(
    block: RamBlock,
    pages: NDArray[np.int64],
    *,
    prefix: bytes = b"",
    suffix: bytes = b"",
    page_bits: int = PAGE_SHIFT,
) -> EncodedPages:
    """Records for pages of one block; the first names the block.

    Each page is looked at once, to find those that are all zero. A few hundred pages at a time stay in the
    cache between that look and the system call that sends them.

    :param pages: numbers of 4 KiB pages, dtype int64, in the order in which they are to be sent
    :param prefix: bytes to send before the records: the opening of the part
    :param suffix: bytes to send after the records: `END_OF_RECORDS` and the footer
    :param page_bits: log2 of the stream's page size, 10 to 12; a smaller page than 4 KiB makes several
        records of each
    :raise ValueError: When a page number is outside the block.
    """
    if pages.size and not (int(pages.min()) >= 0 and int(pages.max()) < block.pages):
        raise ValueError(f"{block!r} has {block.pages} pages: {int(pages.min())} to {int(pages.max())} given")
    pages = stream_pages(pages, page_bits)
    name = wire_name(block.name)
    headers = np.empty(len(prefix) + pages.size * 9 + len(name) + len(suffix), dtype=np.uint8)
    headers[: len(prefix)] = bytes_array(prefix)
    iov = np.empty((2 * pages.size + 2, 2), dtype=np.uint64)
    rows, nbytes, normal = records.encode_records(
        np.array([(page_bits, len(prefix), block.hva, headers.ctypes.data)], dtype=records.PLAN),
        block.data.view(np.uint64),
        pages,
        bytes_array(name),
        bytes_array(suffix),
        headers,
        iov,
    )
    return EncodedPages(iov[:rows], nbytes, normal, pages.size - normal, (headers, block))


_ZERO_RECORD = np.dtype([("word", ">u8"), ("fill", "u1")])


def stream_pages(pages: PageNumbers, page_bits: int) -> PageNumbers:
    """The pages of the stream, 2**page_bits bytes each, that make up pages of 4 KiB."""
    if page_bits == PAGE_SHIFT:
        return np.ascontiguousarray(pages)
    split = 1 << (PAGE_SHIFT - page_bits)
    return np.ascontiguousarray(pages[:, np.newaxis] * split + np.arange(split, dtype=np.int64)).reshape(-1)


def zero_records(block: RamBlock, pages: PageNumbers, page_bits: int) -> bytes:
    """Records of pages (numbers in the stream's page size, at least one) that are zero; the first names the block."""
    others = np.zeros(pages.size - 1, dtype=_ZERO_RECORD)
    others["word"] = pages[1:] << page_bits | int(RamFlag.ZERO | RamFlag.CONTINUE)
    head = record_head((int(pages[0]) << page_bits) | int(RamFlag.ZERO), wire_name(block.name))
    return b"".join((head, b"\0", others.tobytes()))
