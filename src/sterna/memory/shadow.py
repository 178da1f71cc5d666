"""A second copy of RAM: what somebody was given of it, page by page, for comparing it with RAM as it is.

It costs as much memory as the pages that were kept and are not zero. Pages that were never kept are zero in it, and so is
memory that was never touched, which is not read.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from sterna.host.limits import usable_cpus
from sterna.jit.kernel import kernel
from sterna.memory.address import BITS_PER_WORD, PAGE_SHIFT, PAGE_SIZE, PAGES_PER_PMD
from sterna.memory.bitmap import PageNumbers, Words, full_bitmap, new_bitmap, page_numbers
from sterna.memory.content import copy
from sterna.memory.digest import populated_chunks
from sterna.memory.ram import RamBlock
from sterna.memory.room import require_room

_THREADS = 2
_FEW_WORDS = 64
"""Words of a bitmap, of 256 KiB each, that are not worth a second thread."""

Memory = NDArray[np.uint64]
"""A block's bytes as 64-bit words, 512 of them a page."""


def _differs_twin(left: Memory, right: Memory, first: int) -> bool:
    return bool((left[first : first + 512] != right[first : first + 512]).any())


@kernel(twin=_differs_twin, ahead=False, inline=True)
def _differs(left: Memory, right: Memory, first: int) -> bool:
    """Whether the page whose first word this is is not the same in both."""
    different = np.uint64(0)
    for i in range(first, first + 512):
        different |= left[i] ^ right[i]
    return different != np.uint64(0)


@kernel()
def _copy(source: Memory, target: Memory, pages: PageNumbers) -> None:
    """Copy pages of `source` that differ to `target`; a page that is equal costs no memory there."""
    for n in range(pages.size):
        first = pages[n] * 512
        if _differs(source, target, first):
            copy(target[first : first + 512], source[first : first + 512])


@kernel()
def _compare(left: Memory, right: Memory, judged: Words, first: int, end: int, out: Words) -> None:
    """Set the bits of `out` for those pages of words `first` to `end` of `judged` that differ."""
    for w in range(first, end):
        word = judged[w]
        if word == np.uint64(0):
            continue
        for bit in range(64):
            if (word >> np.uint64(bit)) & np.uint64(1) and _differs(left, right, (w * 64 + bit) * 512):
                out[w] |= np.uint64(1) << np.uint64(bit)


class Shadow:
    """Copies of RAM blocks, all zero at first.

    :raise RamError: When the host refuses the memory, or has too little left.
    """

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        size = sum(block.size for block in blocks)
        require_room("the audit's second copy of guest RAM (x-sterna-audit)", size, blocks)
        self._blocks = {block.name: block for block in blocks}
        self._copies = {block.name: RamBlock(block.name, block.size) for block in blocks}

    def block(self, name: str) -> RamBlock:
        """The copy of a block, under its name."""
        return self._copies[name]

    def keep(self, name: str, pages: PageNumbers) -> None:
        """Copy these pages as they are now. One that is written meanwhile may be copied half before, half after."""
        _copy(self._blocks[name].data.view(np.uint64), self._copies[name].data.view(np.uint64), pages)

    def judged(self, name: str, excused: Words) -> Words:
        """The pages of a block that `differing` has to look at: with memory behind them, and not excused.

        :param excused: bitmap of the block's pages
        """
        block = self._blocks[name]
        words = full_bitmap(block.pages) & ~excused
        per_chunk = PAGES_PER_PMD // BITS_PER_WORD
        words[~np.repeat(populated_chunks(block), per_chunk)[: words.size]] = 0
        return words

    def differing(self, name: str, judged: Words) -> PageNumbers:
        """Which of these pages of a block are not what they were when they were kept."""
        ram, copy = (blocks[name].data.view(np.uint64) for blocks in (self._blocks, self._copies))
        out = new_bitmap(self._blocks[name].pages)
        if out.size <= _FEW_WORDS:
            _compare(ram, copy, judged, 0, out.size, out)
            return page_numbers(out)
        threads = min(_THREADS, usable_cpus())
        edges = [out.size * n // threads for n in range(threads + 1)]

        def compare(part: int) -> None:
            _compare(ram, copy, judged, edges[part], edges[part + 1], out)

        with ThreadPoolExecutor(threads, thread_name_prefix="shadow") as pool:
            for _ in pool.map(compare, range(threads)):
                pass
        return page_numbers(out)

    def difference(self, name: str, page: int) -> tuple[int, int]:
        """The first and the last byte of a page, counted from its start, that differ; the page does."""
        at = page << PAGE_SHIFT
        differ = self._blocks[name].data[at : at + PAGE_SIZE] != self._copies[name].data[at : at + PAGE_SIZE]
        found = np.flatnonzero(differ)
        return int(found[0]), int(found[-1])

    def close(self) -> None:
        """Give the memory back."""
        for kept in self._copies.values():
            kept.close()
