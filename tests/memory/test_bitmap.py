"""Bitmaps: bits set in any order and number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.memory import bitmap
from sterna.memory.bitmap import count, counts, new_bitmap, page_numbers, set_bits, spread, widen

PAGES = 3 * 64 + 5


@given(st.sets(st.integers(0, PAGES - 1)), st.lists(st.integers(0, PAGES - 1), max_size=300))
def test_bits_that_are_set(before, more):
    words = new_bitmap(PAGES)
    set_bits(words, np.array(sorted(before), dtype=np.uint64))
    assert page_numbers(words).tolist() == sorted(before)
    set_bits(words, np.array(more, dtype=np.uint64))
    assert page_numbers(words).tolist() == sorted(before | set(more))
    assert count(words) == len(before | set(more))


@given(st.sets(st.integers(0, PAGES - 1), min_size=1), st.integers(1, 300))
def test_some_bits_are_every_so_manieth(pages, most):
    words = new_bitmap(PAGES)
    set_bits(words, np.array(sorted(pages), dtype=np.uint64))
    found = spread(words, most)
    assert found.dtype == np.int64
    assert found.tolist() == sorted(pages)[:: -(-len(pages) // most)]
    assert counts(words).tolist() == [sum(page // 64 == word for page in pages) for word in range(words.size)]


@pytest.mark.parametrize("number", [1, 1000])
def test_few_and_many_bits_of_a_large_bitmap(number):
    pages = np.random.default_rng(number).integers(0, 1 << 16, number, dtype=np.uint64)
    words = new_bitmap(1 << 16)
    set_bits(words, pages)
    assert page_numbers(words).tolist() == np.unique(pages).tolist()


@pytest.mark.parametrize("number", [1, 64])
def test_a_page_beyond_is_refused(number):
    words = new_bitmap(1 << 10)
    with pytest.raises(IndexError):
        set_bits(words, np.full(number, 1 << 10, dtype=np.uint64))


def test_a_bitmap_that_is_written_meanwhile_gives_what_it_had(monkeypatch):
    words = new_bitmap(PAGES)
    set_bits(words, np.array([3], dtype=np.uint64))
    plain = bitmap.count

    def write_after_counting(some):
        found = plain(some)
        set_bits(words, np.arange(64, dtype=np.uint64))
        return found

    monkeypatch.setattr(bitmap, "count", write_after_counting)
    assert page_numbers(words).tolist() == [3]


@given(st.integers(1, 200), st.sampled_from([1, 2, 4, 16, 64]), st.data())
def test_bits_for_many_pages_each(pages, factor, data):
    large = data.draw(st.sets(st.integers(0, pages - 1)))
    words = new_bitmap(pages)
    set_bits(words, np.array(sorted(large), dtype=np.uint64))
    found = widen(words, factor, pages * factor)
    assert found.size == new_bitmap(pages * factor).size
    assert page_numbers(found).tolist() == [
        page * factor + i for page in sorted(large) for i in range(factor)
    ]
    assert (found is words) == (factor == 1)
