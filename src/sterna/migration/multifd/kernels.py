"""Compiled kernels between page numbers and memory, and their plain twins. Callers have checked the numbers."""

import numpy as np
from numpy.typing import NDArray

from sterna.memory.bitmap import Words
from sterna.memory.kernel import kernel

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int64]
Vectors = NDArray[np.uint64]


def _split_zero_twin(words: Words, pages: Numbers, page_bits: int, zero: Numbers, whole: Numbers) -> int:
    marks = [not words[page << page_bits - 3 : (page + 1) << page_bits - 3].any() for page in pages.tolist()]
    found = np.array(marks, dtype=bool)
    zero[: found.sum()] = pages[found]
    whole[: pages.size - found.sum()] = pages[~found]
    return int(found.sum())


@kernel(twin=_split_zero_twin)
def split_zero(words: Words, pages: Numbers, page_bits: int, zero: Numbers, whole: Numbers) -> int:
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
        first = pages[i] * per_page
        is_zero = True
        for group in range(first, first + per_page, 8):
            seen = words[group]
            for j in range(1, 8):
                seen |= words[group + j]
            if seen != np.uint64(0):
                is_zero = False
                break
        if is_zero:
            zero[zeros] = pages[i]
            zeros += 1
        else:
            whole[i - zeros] = pages[i]
    return zeros


def _runs_twin(pages: Numbers, hva: int, page_bits: int, vectors: Vectors) -> int:
    starts = np.flatnonzero(np.diff(pages, prepend=-2) != 1)
    lengths = np.diff(starts, append=pages.size)
    vectors[: starts.size, 0] = np.uint64(hva) + (pages[starts] << page_bits).astype(np.uint64)
    vectors[: starts.size, 1] = lengths << page_bits
    return int(starts.size)


@kernel(twin=_runs_twin)
def runs(pages: Numbers, hva: int, page_bits: int, vectors: Vectors) -> int:
    """The memory of pages as a gather list; pages that follow each other are one piece.

    :param hva: address of page 0
    :param vectors: where the list goes; as long as `pages`
    :return: its length
    """
    rows = 0
    for i in range(pages.size):
        if i > 0 and pages[i] == pages[i - 1] + 1:
            vectors[rows - 1, 1] += np.uint64(1 << page_bits)
        else:
            vectors[rows, 0] = np.uint64(hva) + np.uint64(pages[i] << page_bits)
            vectors[rows, 1] = 1 << page_bits
            rows += 1
    return rows


def _mark_twin(bitmap: Words, pages: Numbers) -> None:
    np.bitwise_or.at(bitmap, pages >> 6, np.uint64(1) << (pages & 63).astype(np.uint64))


@kernel(twin=_mark_twin)
def mark(bitmap: Words, pages: Numbers) -> None:
    """Set the bits of pages."""
    for i in range(pages.size):
        bitmap[pages[i] >> 6] |= np.uint64(1) << np.uint64(pages[i] & 63)


def _place_twin(data: Bytes, pages: Numbers, page_bits: int, ram: Bytes) -> None:
    ram.reshape(-1, 1 << page_bits)[pages] = data.reshape(-1, 1 << page_bits)


@kernel(twin=_place_twin)
def place(data: Bytes, pages: Numbers, page_bits: int, ram: Bytes) -> None:
    """Copy pages that lie one after the other to their places in a block."""
    size = 1 << page_bits
    for i in range(pages.size):
        target = ram[pages[i] * size : (pages[i] + 1) * size]
        page = data[i * size : (i + 1) * size]
        for j in range(size):
            target[j] = page[j]
