"""The work of a pass: which pages are to be sent, in batches, and as what."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.memory.address import BITS_PER_WORD, PAGES_PER_PMD
from sterna.memory.bitmap import (
    DirtyBatch,
    PageNumbers,
    Words,
    count,
    counts,
    full_bitmap,
    new_bitmap,
    page_numbers,
    spread,
)
from sterna.memory.digest import populated_chunks
from sterna.memory.ram import RamBlock
from sterna.stream.ram.encoder import BATCH_PAGES, Batch

_WORDS_PER_CHUNK = PAGES_PER_PMD // BITS_PER_WORD
_UNTOUCHED_CHUNKS = 64
"""Chunks without memory that are handed over at once: their records take a third of a MiB, and nothing is read for them."""


@dataclass
class _Rest:
    """What is to be sent of a block: the words of its bitmap from `at` on."""

    block: RamBlock
    words: Words
    at: int = 0


class PassWork:
    """Pages to send, block by block; batches leave it as they are handed to the channel.

    It owns the dirty bits it was made from. Whatever has not been sent when the log is synced again
    joins the next pass's work (`merged`); when the migration ends early the bits need not return anywhere,
    because logging stops and every later migration begins with all pages. They stay bits until they are handed out.

    :param work: bitmaps of blocks
    :param first: it is all of guest RAM, some of which has no memory
    """

    def __init__(self, work: Iterable[tuple[RamBlock, Words]], *, first: bool = False) -> None:
        self._work = [_Rest(block, words) for block, words in work]
        self._first = first
        self.pages = sum(count(rest.words) for rest in self._work)
        """Pages not sent yet."""

    @staticmethod
    def everything(blocks: Sequence[RamBlock]) -> "PassWork":
        """The first pass: every page of every block."""
        return PassWork(((block, full_bitmap(block.pages)) for block in blocks), first=True)

    @staticmethod
    def merged(left: "PassWork", blocks: Sequence[RamBlock], batches: Iterable[DirtyBatch]) -> "PassWork":
        """What is left of one pass, and what a sync of the dirty log found; each page once."""
        bitmaps: dict[str, Words] = {block.name: new_bitmap(block.pages) for block in blocks}
        left.merge_into(bitmaps)
        for batch in batches:
            batch.merge_into(bitmaps[batch.block])
        return PassWork((block, bitmaps[block.name]) for block in blocks)

    def merge_into(self, bitmaps: Mapping[str, Words]) -> None:
        """Set the bits of what has not been sent yet in other bitmaps of the same blocks."""
        for rest in self._work:
            words = bitmaps[rest.block.name][rest.at :]
            np.bitwise_or(words, rest.words[rest.at :], out=words)

    def sample(self, most: int) -> list[tuple[RamBlock, PageNumbers]]:
        """Up to so many pages of each block that have not been sent yet, from all over it; fewer of a block that has fewer."""
        found = []
        for rest in self._work:
            words = rest.words[rest.at :]
            if here := count(words):
                share = max(1, most * here // self.pages)
                found.append((rest.block, spread(words, share) + rest.at * BITS_PER_WORD))
        return found

    def batches(self) -> Iterator[Batch]:
        """Hand out everything, in batches. A batch counts as sent when the next one is asked for."""
        for rest in self._work:
            populated = populated_chunks(rest.block) if self._first else None
            ends = np.cumsum(counts(rest.words), dtype=np.int64)
            while rest.at < rest.words.size:
                untouched = False
                if populated is None:
                    done = int(ends[rest.at - 1]) if rest.at else 0
                    # A word's pages stay together.
                    end = int(np.searchsorted(ends, done + BATCH_PAGES, side="right"))
                else:
                    # In the first pass batches are chunks: reading one that has no memory would give it some.
                    untouched, chunks = _run_of_chunks(populated, rest.at // _WORDS_PER_CHUNK)
                    end = rest.at + chunks * _WORDS_PER_CHUNK
                pages = page_numbers(rest.words[rest.at : end]) + rest.at * BITS_PER_WORD
                if pages.size:
                    yield Batch(rest.block, pages, untouched)
                    self.pages -= int(pages.size)
                rest.at = end


@dataclass(frozen=True)
class HeatMap:
    """How often the pages of a block were sent, in cells of neighbouring pages.

    :ivar pages: of the block
    :ivar pages_per_cell: the last cell may have fewer
    :ivar sent: times that pages of each cell were sent, all together
    :ivar most: times that its most sent page was
    """

    block: str
    pages: int
    pages_per_cell: int
    sent: list[int]
    most: list[int]


def _run_of_chunks(populated: NDArray[np.bool_], chunk: int) -> tuple[bool, int]:
    """Whether this chunk and those after it have no memory, and for how many, as far as one batch goes, that is the same."""
    untouched = not populated[chunk]
    most = _UNTOUCHED_CHUNKS if untouched else BATCH_PAGES // PAGES_PER_PMD
    others = populated[chunk : chunk + most] == untouched
    return untouched, int(others.argmax()) if others.any() else int(others.size)


class SentPages:
    """Which pass sent each page last, and how many did. Numbers past 65535 count as that."""

    def __init__(self, blocks: Sequence[RamBlock]) -> None:
        self._passes = {block.name: np.zeros(block.pages, dtype=np.uint16) for block in blocks}
        self._times = {block.name: np.zeros(block.pages, dtype=np.uint16) for block in blocks}

    def record(self, batch: Batch, number: int) -> None:
        """Pass `number` sent these pages."""
        pages = batch.pages
        first, last = int(pages[0]), int(pages[-1]) + 1
        # A run, as most of the first pass is, is marked without a list of its pages.
        where = slice(first, last) if last - first == pages.size else pages
        self._passes[batch.block.name][where] = min(number, 0xFFFF)
        times = self._times[batch.block.name]
        # A pass sends a page once, so no index comes twice.
        times[where] += times[where] < 0xFFFF

    def pass_of(self, block: str, page: int) -> int:
        """The pass that sent it last; 0 for none."""
        return int(self._passes[block][page])

    def heat_maps(self, cells: int) -> list[HeatMap]:
        """How often pages were sent, with at most so many cells for each block. Any thread may ask."""
        found = []
        for block, times in self._times.items():
            size = max(1, -(-times.size // cells))
            starts = np.arange(0, times.size, size)
            found.append(
                HeatMap(
                    block,
                    int(times.size),
                    size,
                    np.add.reduceat(times, starts, dtype=np.int64).tolist(),
                    np.maximum.reduceat(times, starts).tolist(),
                )
            )
        return found
