"""Records into guest RAM: see `sterna.stream.ram`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.memory.address import PAGE_SHIFT
from sterna.memory.bitmap import Words, new_bitmap
from sterna.memory.digest import piece_count
from sterna.memory.ram import RamBlock
from sterna.stream.ram import records
from sterna.stream.ram.records import Status, bytes_array
from sterna.stream.ram.setup import named_block, read_setup
from sterna.stream.reader import StreamReader
from sterna.stream.wire import XBZRLE_ENCODING, RamFlag, StreamError
from sterna.stream.xbzrle import coding


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
        at, status = records.decode_records(
            reader.staging,
            at,
            end,
            bytes_array(block.name.encode() if block else b""),
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
    fault, where = coding.check(bytes_array(code), 1 << page_bits)
    return reader.error(f"{what} cannot be applied: {coding.Fault(fault).text}", at + 3 + int(where))


_NOTHING: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
_NO_BITMAP: Words = np.zeros(0, dtype=np.uint64)


def _pieces(size: int) -> NDArray[np.uint8]:
    return np.zeros(piece_count(size), dtype=np.uint8)
