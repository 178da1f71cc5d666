"""Dirty bitmaps, and the batches that a harvest of the dirty log hands over."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from sterna.jit.kernel import kernel
from sterna.memory.address import BITS_PER_WORD, bitmap_words

Words = NDArray[np.uint64]
"""A dirty bitmap: `shape (bitmap_words(pages),)`, dtype uint64, bit n of word w is page 64 * w + n."""
PageNumbers = NDArray[np.int64]


def new_bitmap(pages: int) -> Words:
    """A bitmap of `pages` clear bits."""
    return np.zeros(bitmap_words(pages), dtype=np.uint64)


def full_bitmap(pages: int) -> Words:
    """A bitmap of `pages` set bits; the bits past the last page are clear."""
    words = np.full(bitmap_words(pages), np.iinfo(np.uint64).max, dtype=np.uint64)
    if pages % BITS_PER_WORD:
        words[-1] = (1 << pages % BITS_PER_WORD) - 1
    return words


def set_range(words: Words, first: int, count: int) -> None:
    """Set `count` bits from bit `first` on."""
    if count <= 0:
        return
    last = first + count - 1
    low = np.uint64((1 << 64) - (1 << first % BITS_PER_WORD))
    high = np.uint64((2 << last % BITS_PER_WORD) - 1)
    start, end = first // BITS_PER_WORD, last // BITS_PER_WORD
    if start == end:
        words[start] |= low & high
        return
    words[start] |= low
    words[start + 1 : end] = np.iinfo(np.uint64).max
    words[end] |= high


_SPARSE = 128
"""Pages of a bitmap per page to set from which on setting one after the other is quicker."""


def set_bits(words: Words, pages: NDArray[np.uint64]) -> None:
    """Set the bits of these pages, in any order; a page may come twice.

    :raise IndexError: When a page is beyond the bitmap's words.
    """
    if pages.size * _SPARSE < words.size * BITS_PER_WORD:
        bits = np.uint64(1) << (pages & np.uint64(BITS_PER_WORD - 1))
        np.bitwise_or.at(words, (pages // np.uint64(BITS_PER_WORD)).astype(np.intp), bits)
        return
    flags = np.zeros(words.size * BITS_PER_WORD, dtype=np.uint8)
    flags[pages.astype(np.intp)] = 1
    np.bitwise_or(words, np.packbits(flags, bitorder="little").view(np.uint64), out=words)


def counts(words: Words) -> NDArray[np.uint8]:
    """Number of set bits of each word."""
    if hasattr(np, "bitwise_count"):
        return np.asarray(np.bitwise_count(words))
    return _bits(words).sum(axis=1, dtype=np.uint8)  # numpy before 2.0


def count(words: Words) -> int:
    """Number of set bits."""
    return int(counts(words).sum(dtype=np.int64))


def _bits(words: Words) -> NDArray[np.uint8]:
    """:return: `shape (words, 64)`"""
    return np.unpackbits(words.view(np.uint8), bitorder="little").reshape(-1, BITS_PER_WORD)


def spread(words: Words, most: int) -> NDArray[np.int64]:
    """The numbers of up to `most` set bits, ascending, from all over the bitmap."""
    ends = np.cumsum(counts(words), dtype=np.int64)
    ranks = np.arange(0, int(ends[-1]), max(1, -(-int(ends[-1]) // most)))
    at = np.searchsorted(ends, ranks, side="right")
    bits = _bits(words[at])
    before = ends[at] - bits.sum(axis=1)
    return at * BITS_PER_WORD + (bits.cumsum(axis=1) > (ranks - before)[:, np.newaxis]).argmax(axis=1)


def _page_numbers_twin(words: Words, out: NDArray[np.int64]) -> int:
    pages = np.flatnonzero(np.unpackbits(words.view(np.uint8), bitorder="little"))
    out[: pages.size] = pages
    return int(pages.size)


@kernel(twin=_page_numbers_twin)
def _page_numbers(words: Words, out: NDArray[np.int64]) -> int:
    n = 0
    for w in range(words.size):
        word = words[w]
        if word == np.uint64(0):
            continue
        for bit in range(64):
            if (word >> np.uint64(bit)) & np.uint64(1):
                out[n] = w * 64 + bit
                n += 1
    return n


def page_numbers(words: Words) -> NDArray[np.int64]:
    """The numbers of the set bits, ascending, dtype int64."""
    words = words.copy()  # a log may be written meanwhile, and room is made for what is counted
    # Room for no more than there are: memory that is touched for the first time costs more than to count.
    out = np.empty(count(words), dtype=np.int64)
    _page_numbers(words, out)
    return out


def widen(words: Words, factor: int, pages: int) -> Words:
    """The bitmap of `pages` pages, of which `words` has one bit for every `factor`; with a factor of 1 `words` itself."""
    if factor == 1:
        return words
    bits = np.unpackbits(words.view(np.uint8), bitorder="little")
    return np.packbits(np.repeat(bits, factor), bitorder="little").view(np.uint64)[: bitmap_words(pages)]


@dataclass(frozen=True)
class DirtyBatch:
    """What one harvest of a slot's dirty log found: an owned copy, gone from the log.

    Whoever holds a batch answers for its bits: they are handed on, or merged back with `merge_into`.

    :ivar block: name of the RAM block
    :ivar words: the dirty bitmap of the block's pages
    """

    block: str
    words: Words

    def merge_into(self, words: Words) -> None:
        """Set this batch's bits in another bitmap of the same block."""
        np.bitwise_or(words, self.words, out=words)

    @property
    def pages(self) -> int:
        """Number of dirty pages in the batch."""
        return count(self.words)
