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
from sterna.stream.ram.part import Part
from sterna.stream.ram.setup import read_setup
from sterna.stream.reader import StreamReader
from sterna.stream.wire import RamFlag, StreamError


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
        self._part = Part(self._blocks, page_bits, _refused)
        self._stream = records.new_received(page_bits, fresh)
        self._bytes = 0
        self.received: dict[str, Words] = {
            block.name: new_bitmap(block.size >> page_bits) for block in blocks
        }
        self.written: dict[str, NDArray[np.uint8]] = {block.name: _pieces(block.size) for block in blocks}

    @property
    def block(self) -> RamBlock | None:
        """The block of the last record."""
        return self._part.block

    def statistics(self) -> RamStatistics:
        """What has been received so far."""
        normal, duplicate, changed = (int(self._stream[0][name]) for name in ("whole", "zero", "changed"))
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
        block = self._part.block
        return self._part.after(
            reader,
            *records.apply_records(
                reader.staging,
                at,
                end,
                self._part.name,
                self._stream,
                block.data if block else _NOTHING,
                self.received[block.name] if block else _NO_BITMAP,
                self.written[block.name] if block else _NOTHING,
                self._part.rows,
            ),
        )


def _refused(reader: StreamReader, flags: int) -> StreamError:
    known = RamFlag(flags & sum(RamFlag))
    if flags & ~int(known):
        return reader.error(f"a record with unknown flags {flags:#x}")
    return reader.error(f"a record with flags {flags:#x} ({known.name or 'none'}), which are not supported")


_NOTHING: NDArray[np.uint8] = np.zeros(0, dtype=np.uint8)
_NO_BITMAP: Words = np.zeros(0, dtype=np.uint64)


def _pieces(size: int) -> NDArray[np.uint8]:
    return np.zeros(piece_count(size), dtype=np.uint8)
