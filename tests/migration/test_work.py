"""What is to be sent: handed out once, in batches, and what is left when more is found."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.memory.bitmap import DirtyBatch, new_bitmap, page_numbers, set_bits
from sterna.memory.ram import RamBlock
from sterna.migration.transport.work import PassWork
from sterna.stream.ram.encoder import BATCH_PAGES

PAGES = 5000
runs = st.lists(st.tuples(st.integers(0, PAGES - 1), st.integers(1, 3000)), max_size=4)


def bitmap(runs: list[tuple[int, int]]) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    words = new_bitmap(PAGES)
    for first, size in runs:
        set_bits(words, np.arange(first, min(PAGES, first + size), dtype=np.uint64))
    return words


@given(runs, runs, runs, st.integers(0, 6))
def test_each_page_is_handed_out_once_and_what_is_left_joins_what_is_found(
    low: list[tuple[int, int]], high: list[tuple[int, int]], found: list[tuple[int, int]], taken: int
) -> None:
    with RamBlock("low", PAGES << 12) as one, RamBlock("high", PAGES << 12) as two:
        blocks = [one, two]
        work = PassWork([(one, bitmap(low)), (two, bitmap(high))])
        expected = {"low": set(page_numbers(bitmap(low))), "high": set(page_numbers(bitmap(high)))}
        sent: dict[str, list[int]] = {"low": [], "high": []}
        batches = list(itertools.islice(work.batches(), taken))
        # Nobody has asked for what follows the last, unless there was nothing more.
        for batch in batches[:-1] if len(batches) == taken else batches:
            assert 0 < batch.pages.size <= BATCH_PAGES
            assert not batch.untouched
            sent[batch.block.name] += batch.pages.tolist()
        for name, pages in sent.items():
            assert pages == sorted(pages)
            expected[name] -= set(pages)
        assert work.pages == sum(map(len, expected.values()))
        for block, pages in work.sample(7):
            assert 0 < pages.size <= 7
            assert expected[block.name].issuperset(pages.tolist())
        merged = PassWork.merged(work, blocks, [DirtyBatch("high", bitmap(found))])
        expected["high"] |= set(page_numbers(bitmap(found)))
        assert merged.pages == sum(map(len, expected.values()))
        handed: dict[str, list[int]] = {"low": [], "high": []}
        for batch in merged.batches():
            handed[batch.block.name] += batch.pages.tolist()
        assert handed == {name: sorted(pages) for name, pages in expected.items()}
        assert merged.pages == 0


@pytest.mark.parametrize("pages", [1, 100, PAGES])
def test_everything_is_handed_out_with_what_has_no_memory_apart(pages: int) -> None:
    with RamBlock("ram", pages << 12, huge_pages=False) as block:
        block.data[: min(pages, 700) << 12 : 4096] = 1
        work = PassWork.everything([block])
        assert work.pages == pages
        batches = list(work.batches())
        assert np.concatenate([batch.pages for batch in batches]).tolist() == list(range(pages))
        assert [batch.untouched for batch in batches] == ([False, True] if pages == PAGES else [False])
