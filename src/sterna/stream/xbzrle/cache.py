"""The source's side of XBZRLE: a cache of pages as they were sent last, and what it saves.

The cache is direct-mapped: a page has one place, its number among the pages of all blocks modulo the number of
places. It is filled with the pages that are sent whole or as zeros, from the second pass on as QEMU does, or `from_start`;
from then on a page that is in it goes as what changed, or not at all when nothing did. A page that was used in this pass or
the last is not displaced by another.

Each page's memory is taken from the host when the page enters; pages that are zero, and from the start those that are hardly
more, take next to none. As large as guest RAM, the cache keeps them all.

From the start, a page that is not in the cache and zeros for the most part is also sent as what it changes: as a zero page, and
then as what differs from that. Any destination that knows XBZRLE can take it.

What the next pages will cost is found by encoding a few of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.bitmap import PageNumbers
from sterna.memory.ram import RamBlock
from sterna.memory.room import require_room, spare_bytes
from sterna.memory.vectors import Vectors
from sterna.stream.ram.encoder import BATCH_PAGES, Batch, stream_pages
from sterna.stream.ram.records import bytes_array
from sterna.stream.ram.setup import wire_name
from sterna.stream.wire import NAME_LIMIT
from sterna.stream.xbzrle import changes
from sterna.stream.xbzrle.changes import BATCH, COUNTED, PLACE, Counted
from sterna.stream.xbzrle.statistics import XbzrleStatistics

_SAMPLES = 256
"""Pages that are encoded to find what all would cost."""
_PROBES = 8
_LEAST_CACHE = 1 << 20
_TOGETHER: PageNumbers = np.zeros(0, dtype=np.int64)


class Work(Protocol):
    """Pages that are to be sent.

    :ivar pages: how many
    """

    pages: int

    def sample(self, most: int) -> Sequence[tuple[RamBlock, PageNumbers]]:
        """Some of them, block by block, from all over each."""
        ...


@dataclass(frozen=True)
class EncodedBatch:
    """A batch as records.

    :ivar iov: pieces, good until the next batch is encoded
    :ivar nbytes: bytes on the wire
    :ivar normal: pages that went whole
    :ivar zero: pages that are all zero
    :ivar saved: pages that went as what changed, or are unchanged
    """

    iov: Vectors
    nbytes: int
    normal: int
    zero: int
    saved: int


@dataclass(frozen=True)
class ApartBatch:
    """A batch as records, but for the pages that go whole.

    :ivar records: what goes in records, empty when nothing does
    :ivar pages: numbers of the pages that go whole, in the stream's page size
    :ivar sources: where they are as they are to be sent, until the next pass
    :ivar zero: pages that are all zero
    :ivar saved: pages that went as what changed, or are unchanged
    """

    records: bytes
    pages: PageNumbers
    sources: Vectors
    zero: int
    saved: int


class XbzrleCache:
    """The cache of one migration. `encode` from one thread only.

    :param blocks: all of guest RAM
    :param cache_bytes: a power of two, at least one page; what is beyond guest RAM is not used
    :param page_bits: log2 of the stream's page size
    :param from_start: pages of the first pass may be encoded
    :param audit_bytes: what an audit's second copy of RAM may yet take; it and the cache have to fit in together

    :ivar statistics: as of the end of the last pass

    :raise RamError: When the host refuses the memory, or has too little left.
    """

    def __init__(
        self,
        blocks: Sequence[RamBlock],
        cache_bytes: int,
        page_bits: int = PAGE_SHIFT,
        *,
        from_start: bool = False,
        audit_bytes: int = 0,
    ) -> None:
        self.from_start = from_start
        self._cache_bytes = cache_bytes
        self._page_bits = page_bits
        self._split = PAGE_SHIFT - page_bits
        self._first_keys: dict[str, int] = {}
        # No key is 0: memory that was never touched says that a place is empty, and costs nothing.
        pages = 1
        for block in blocks:
            self._first_keys[block.name] = pages
            pages += block.size >> page_bits
        # Never less than what the memory comes in.
        places = max(min(cache_bytes >> page_bits, 1 << (pages - 2).bit_length()), 1 << self._split)
        # A place that no page has takes no memory.
        needed = min(places << page_bits, sum(block.size for block in blocks))
        what = "the XBZRLE cache (xbzrle-cache-size)"
        if audit_bytes:
            both = f"{what} and the audit's second copy of guest RAM (x-sterna-audit) together"
            require_room(both, needed + audit_bytes, blocks)
        else:
            require_room(what, needed, ())
        self._memory = RamBlock("xbzrle cache", places << page_bits)
        self._places = np.zeros(places, dtype=PLACE)
        self._codes = np.zeros(places * changes.CODE_ROOM, dtype=np.uint8)
        records = BATCH_PAGES << self._split
        self._out = np.empty(records * ((1 << page_bits) + 16) + (1 << PAGE_SHIFT), dtype=np.uint8)
        self._iov = np.empty((2 * records + 2, 2), dtype=np.uint64)
        self._scratch = np.zeros((3, (1 << page_bits) >> 3), dtype=np.uint64)
        self._counts = np.zeros(1, dtype=COUNTED)
        self._before = self._counts.copy()
        self._pass_pages = 0
        self._number = 0
        self.statistics = XbzrleStatistics(cache_bytes)
        # No pages: this has the kernel compiled (or read from the disk) before the first pass is on its way.
        self._encode(blocks[0], np.zeros(0, dtype=np.int64), 0, b"", b"", False, _TOGETHER)

    def encode(
        self, batch: Batch, number: int, *, prefix: bytes = b"", suffix: bytes = b"", keep: bool = True
    ) -> EncodedBatch:
        """Records of dirty pages.

        :param number: of the pass, at least 2 unless pages are encoded from the start
        :param prefix: bytes to send before the records
        :param suffix: bytes to send after the records
        :param keep: whether another pass may follow
        """
        rows, nbytes, normal, zero, saved = self._encode_batch(batch, number, prefix, suffix, keep, _TOGETHER)
        return EncodedBatch(self._iov[:rows], nbytes, normal, zero, saved)

    def encode_apart(self, batch: Batch, number: int, *, keep: bool = True) -> ApartBatch:
        """As `encode`, for pages that go whole by another way. It must have read them before the next pass."""
        apart = np.empty(batch.pages.size << self._split, dtype=np.int64)
        rows, nbytes, _, zero, saved = self._encode_batch(batch, number, b"", b"", keep, apart)
        return ApartBatch(self._out[:nbytes].tobytes(), apart[:rows], self._iov[:rows].copy(), zero, saved)

    def _encode_batch(
        self, batch: Batch, number: int, prefix: bytes, suffix: bytes, keep: bool, apart: PageNumbers
    ) -> tuple[int, int, int, int, int]:
        """
        :return: rows of the gather list, bytes on the wire; pages that go whole, that are all zero, and others
        """
        block = batch.block
        pages = stream_pages(batch.pages, self._page_bits)
        assert pages.size <= BATCH_PAGES << self._split
        assert not pages.size or 0 <= int(pages.min()) <= int(pages.max()) < block.size >> self._page_bits
        before = self._counts.copy()
        self._number = number
        rows, nbytes = self._encode(block, pages, number, prefix, suffix, keep, apart)
        self._pass_pages += int(batch.pages.size)
        new = _since(before, self._counts)
        normal, zero = int(new["normal"]) >> self._split, int(new["zero"]) >> self._split
        return rows, nbytes, normal, zero, int(batch.pages.size) - normal - zero

    def _encode(
        self,
        block: RamBlock,
        pages: PageNumbers,
        number: int,
        prefix: bytes,
        suffix: bytes,
        keep: bool,
        apart: PageNumbers,
    ) -> tuple[int, int]:
        assert len(prefix) + len(suffix) + NAME_LIMIT < PAGE_SIZE
        self._out[: len(prefix)] = bytearray(prefix)
        place = (self._first_keys[block.name], self._page_bits, len(prefix))
        addresses = (block.hva, self._out.ctypes.data, self._memory.hva)
        batch = np.array([(*place, *addresses, number, keep, self.from_start)], dtype=BATCH)
        return changes.encode_changes(
            batch,
            block.data.view(np.uint64),
            pages,
            bytes_array(wire_name(block.name)),
            bytes_array(suffix),
            self._out,
            self._memory.data.view(np.uint64),
            self._places,
            self._codes,
            self._scratch,
            self._counts,
            self._iov,
            apart,
        )

    def finish_pass(self) -> XbzrleStatistics:
        """A pass has ended: bring the rates up to date.

        :return: the statistics so far
        """
        new, counts = _since(self._before, self._counts), self._counts[0]
        self._before = self._counts.copy()
        hits, code_bytes, looked_up = (
            int(new["hits"]),
            int(new["code_bytes"]),
            self._pass_pages << self._split,
        )
        page_bytes = 1 << self._page_bits
        self._pass_pages = 0
        self.statistics = XbzrleStatistics(
            self._cache_bytes,
            int(counts["code_bytes"]),
            int(counts["hits"]),
            int(counts["misses"]),
            int(new["misses"]) / looked_up if looked_up else 0.0,
            hits * page_bytes / code_bytes if code_bytes else 0.0,
            int(counts["overflows"]),
        )
        return self.statistics

    def rest_bytes(self, work: Work) -> float:
        """Bytes on the wire that these pages would become now, judged by some of them."""
        sampled, size = 0, 0
        counts = self._counts.copy()
        for block, some in work.sample(_SAMPLES):
            _, nbytes = self._encode(
                block, stream_pages(some, self._page_bits), self._number, b"", b"", False, _TOGETHER
            )
            sampled += int(some.size)
            size += nbytes
        self._counts[:] = counts
        return size * work.pages / sampled if sampled else 0.0

    def looks_sparse(self, batch: Batch) -> bool:
        """Whether some of the pages seem to be zeros for the most part, without being zeros."""
        words = batch.block.data.view(np.uint64)
        per_page = PAGE_SIZE >> 3
        for page in batch.pages[:: max(1, batch.pages.size // _PROBES)].tolist():
            content = words[page * per_page : (page + 1) * per_page]
            if content.any() and changes.is_sparse(content):
                return True
        return False

    def close(self) -> None:
        """Give the memory back."""
        self._memory.close()


def _since(before: Counted, now: Counted) -> Any:
    """:return: what has been counted between the two, a record"""
    return (now.view(np.int64) - before.view(np.int64)).view(COUNTED)[0]


def affordable_cache(blocks: Sequence[RamBlock], taken: int = 0) -> int:
    """As large a cache as guest RAM needs, or a smaller one that this process can spare: at most half of the memory that it may
    still take when the guest has touched all of its RAM.

    :param blocks: all of guest RAM
    :param taken: bytes of that memory that something else may take
    :return: a power of two; 0 when the host does not tell, or has next to nothing
    """
    ram_bytes = sum(block.size for block in blocks)
    spare = max(0, (spare_bytes(blocks) or 0) - taken) // 2
    size = min(1 << (ram_bytes - 1).bit_length(), 1 << spare.bit_length() >> 1)
    return size if size >= _LEAST_CACHE else 0
