"""The body of the ``ram`` section, version 4: pages of guest RAM as records.

A record begins with a 64-bit word: the page's offset in its block, and flags in the bits below the page size.
A PAGE record carries the page, a ZERO record one zero byte. Without CONTINUE, the block's name (one byte of
length before it) stands between word and data. An XBZRLE record carries what changed in a page that came
before (`sterna.stream.xbzrle`), after the byte 1 and a 16-bit length. EOS ends the part.

Page data is never copied to be sent: `encode_pages` makes a list of addresses for a vectored system call.
Received records are taken apart by a compiled kernel that copies pages from the staging buffer into guest
RAM.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from sterna.memory.address import PAGE_SHIFT
from sterna.memory.bitmap import Words, new_bitmap
from sterna.memory.digest import piece_count
from sterna.memory.ram import RamBlock
from sterna.stream import ram_kernels, xbzrle
from sterna.stream.ram_kernels import Status
from sterna.stream.reader import StreamReader
from sterna.stream.wire import (
    NAME_LIMIT,
    RAM_BLOCK_LIMIT,
    XBZRLE_ENCODING,
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
        out += _wire_name(name) + size.to_bytes(8, "big")
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
        return b"".join(ram_kernels.bytes_at(int(address), int(size)) for address, size in self.iov)


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
    if page_bits < PAGE_SHIFT:
        split = 1 << (PAGE_SHIFT - page_bits)
        pages = (pages[:, np.newaxis] * split + np.arange(split, dtype=np.int64)).reshape(-1)
    name = _wire_name(block.name)
    headers = np.empty(len(prefix) + pages.size * 9 + len(name) + len(suffix), dtype=np.uint8)
    headers[: len(prefix)] = _bytes_array(prefix)
    iov = np.empty((2 * pages.size + 2, 2), dtype=np.uint64)
    rows, nbytes, normal = ram_kernels.encode_records(
        block.data.view(np.uint64),
        np.ascontiguousarray(pages),
        page_bits,
        _bytes_array(name),
        _bytes_array(suffix),
        headers,
        len(prefix),
        np.array([block.hva, headers.ctypes.data], dtype=np.uint64),
        iov,
    )
    return EncodedPages(iov[:rows], nbytes, normal, pages.size - normal, (headers, block))


@dataclass(frozen=True)
class RamStatistics:
    """What a decoder has received.

    :ivar records: records of pages
    :ivar normal: those that carried a page
    :ivar duplicate: those of pages that are all zero
    :ivar bytes: bytes of the section's bodies, words and names included
    :ivar changed: those that carried what changed in a page
    """

    records: int
    normal: int
    duplicate: int
    bytes: int
    changed: int = 0


class RamDecoder:
    """Puts the pages of a ``ram`` section into guest RAM.

    Writes go past the dirty log, and only into the blocks.

    :param blocks: all of the destination's RAM
    :param page_bits: log2 of the stream's page size
    :param fresh: whether the blocks are all zero and untouched; then pages that are zero from the start stay
        untouched
    :param adopt: asked for a place for a block (name, bytes) of the source's that is not among `blocks`; fresh, or
        None to refuse it

    :ivar received: by block name, a bitmap of the stream's pages that have come, one way or the other
    :ivar written: by block name, a byte for each of its pieces, 1 since a page there was written; may be replaced
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        page_bits: int = PAGE_SHIFT,
        fresh: bool = True,
        adopt: Callable[[str, int], RamBlock | None] = lambda name, size: None,
    ) -> None:
        self._adopt = adopt
        self._blocks = {block.name: block for block in blocks}
        self._page_bits = page_bits
        self._fresh = fresh
        self._block: RamBlock | None = None
        self._counts = np.zeros(3, dtype=np.int64)
        self._bytes = 0
        self.received: dict[str, Words] = {
            block.name: new_bitmap(block.size >> page_bits) for block in blocks
        }
        self.written: dict[str, NDArray[np.uint8]] = {block.name: _pieces(block.size) for block in blocks}

    @property
    def block(self) -> RamBlock | None:
        """The block of the last record."""
        return self._block

    def statistics(self) -> RamStatistics:
        """What has been received so far."""
        normal, duplicate, changed = (int(count) for count in self._counts)
        return RamStatistics(normal + duplicate + changed, normal, duplicate, self._bytes, changed)

    def read_setup(self, reader: StreamReader) -> None:
        """Read the body of the section's first part, and compare its blocks with the destination's.

        :raise StreamError: When they differ in name or size; the text says in which.
        """
        at = reader.offset
        theirs = dict(read_setup(reader, self._page_bits))
        self._bytes += reader.offset - at
        for name, size in theirs.items():
            mine = self._blocks.get(name)
            if mine is None:
                self._take_on(reader, name, size, at)
            elif size != mine.size:
                # QEMU's words.
                text = f"Size mismatch: {name}: {size:#x} != {mine.size:#x} (the source's, and here)"
                raise reader.error(text, at)
        missing = [name for name in self._blocks if name not in theirs]
        if missing:
            raise reader.error(f"RAM block {missing[0]!r} does not exist at the source", at)

    def _take_on(self, reader: StreamReader, name: str, size: int, at: int) -> None:
        block = self._adopt(name, size)
        if block is None:
            # QEMU's words, as of the size.
            raise reader.error(f'Unknown ramblock "{name}", cannot accept migration ({size:#x} bytes)', at)
        self._blocks[name] = block
        self.received[name] = new_bitmap(size >> self._page_bits)
        self.written[name] = _pieces(size)

    def read_records(self, reader: StreamReader) -> None:
        """Read the body of a further or last part, into guest RAM.

        :raise StreamError: When a record is none, or lies outside its block. Records before it have been
            applied.
        """
        start = reader.offset
        try:
            while not self._consume(reader):
                pass
        finally:
            self._bytes += reader.offset - start

    def _consume(self, reader: StreamReader) -> bool:
        """Use the bytes at hand; whether the part has ended."""
        at, end = reader.window
        block = self._block
        at, status = ram_kernels.decode_records(
            reader.staging,
            at,
            end,
            _bytes_array(block.name.encode() if block else b""),
            block.data if block else _NOTHING,
            self._page_bits,
            self.received[block.name] if block else _NO_BITMAP,
            self.written[block.name] if block else _NOTHING,
            self._fresh,
            self._counts,
        )
        reader.advance(at)
        if status == Status.MORE:
            reader.fill()
        elif status == Status.BLOCK:
            self._block = named_block(reader, self._blocks)
        elif status != Status.END:
            raise self._explain(reader, Status(status))
        return bool(status == Status.END)

    def _explain(self, reader: StreamReader, status: Status) -> StreamError:
        word = int.from_bytes(reader.peek(8), "big")
        flags = word & ((1 << self._page_bits) - 1)
        if status == Status.OUTSIDE:
            assert self._block is not None
            return reader.error(
                f"page offset {word - flags:#x} is outside RAM block {self._block.name!r} "
                f"of {self._block.size:#x} bytes"
            )
        if status == Status.FILL:
            return reader.error("a record of a zero page is filled with another byte than zero")
        if status == Status.NO_BLOCK:
            return reader.error("a record continues a RAM block, but none has been named yet")
        if status in CHANGE_FAULTS:
            return explain_change(reader, status, self._page_bits)
        known = RamFlag(flags & sum(RamFlag))
        if flags & ~int(known):
            return reader.error(f"a record with unknown flags {flags:#x}")
        return reader.error(
            f"a record with flags {flags:#x} ({known.name or 'none'}), which are not supported"
        )


CHANGE_FAULTS = (Status.ENCODING, Status.CODE, Status.UNSENT)
"""What can be wrong with the record of a change."""


def explain_change(reader: StreamReader, status: Status, page_bits: int) -> StreamError:
    """What is wrong with the record at hand, of a change that cannot be applied, and where."""
    word = int.from_bytes(reader.peek(8), "big")
    flags = word & ((1 << page_bits) - 1)
    what = f"the change of the page at {word - flags:#x}"
    if status == Status.UNSENT:
        return reader.error(f"{what} comes before the page itself")
    head = 8 if flags & RamFlag.CONTINUE else 9 + reader.peek(9)[8]
    encoding, *length = reader.peek(head + 3)[head:]
    size = int.from_bytes(length, "big")
    at = reader.offset + head
    if encoding != XBZRLE_ENCODING:
        return reader.error(f"{what} has the unknown encoding {encoding:#04x}", at)
    if status == Status.ENCODING:
        return reader.error(f"{what} has {size} bytes, more than a page", at + 1)
    code = reader.peek(head + 3 + size)[head + 3 :]
    fault, where = xbzrle.check(_bytes_array(code), 1 << page_bits)
    return reader.error(f"{what} cannot be applied: {xbzrle.Fault(fault).text}", at + 3 + int(where))


_NOTHING: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
_NO_BITMAP: Words = np.zeros(0, dtype=np.uint64)


def _pieces(size: int) -> NDArray[np.uint8]:
    return np.zeros(piece_count(size), dtype=np.uint8)


def _bytes_array(data: bytes) -> NDArray[np.uint8]:
    return np.array(bytearray(data), dtype=np.uint8)


def _is_name(raw: bytes, name: str) -> bool:
    """Whether a name on the wire is one: not empty, and the only bytes that are read as `name`."""
    return bool(raw) and name.encode() == raw


def _wire_name(name: str) -> bytes:
    raw = name.encode()
    if not 0 < len(raw) <= NAME_LIMIT:
        raise StreamError(f"RAM block {name!r}: a name has 1 to {NAME_LIMIT} bytes")
    return bytes((len(raw),)) + raw
