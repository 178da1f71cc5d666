"""Reading a dirty ring: the compiled kernels and their twins, on entries as the kernel lays them out."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.hypervisor.kvm import dirtyring
from sterna.jit.kernel import COMPILED
from sterna.memory.bitmap import new_bitmap, page_numbers

PAGES = 200
SLOT = 1
ENTRIES = st.lists(
    st.tuples(st.integers(0, 7), st.sampled_from([SLOT, 2, 1 << 16 | SLOT]), st.integers(0, 2 * PAGES)),
    max_size=80,
)


def variants(function):
    return [function, function.twin] if COMPILED else [function]


def columns(entries):
    """Flags, slots and page numbers of an array of struct kvm_dirty_gfn: each a view with the array's stride."""
    ring = np.array(entries, dtype=[("flags", "u4"), ("slot", "u4"), ("offset", "u8")])
    return ring["flags"], ring["slot"], ring["offset"]


@given(ENTRIES)
def test_entries_are_new_up_to_the_first_that_is_not(entries):
    """Dirty, not handed back, and with whatever other flags there may be one day."""
    flags, _slots, _offsets = columns(entries)
    expected = 0
    while expected < len(entries) and entries[expected][0] & 3 == 1:
        expected += 1
    for count_new in variants(dirtyring._count_new):
        assert count_new(flags) == expected


@given(ENTRIES)
def test_only_the_slots_own_entries_are_marked_and_only_within_it(entries):
    _flags, slots, offsets = columns(entries)
    of_slot = [offset for _flag, slot, offset in entries if slot == SLOT]
    for mark in variants(dirtyring._mark):
        words = new_bitmap(PAGES)
        assert mark(slots, offsets, SLOT, words, PAGES) == len(of_slot)
        assert page_numbers(words).tolist() == sorted({page for page in of_slot if page < PAGES})


@pytest.mark.parametrize("offset", [PAGES, 1 << 40, (1 << 64) - 1, 1 << 63])
def test_a_page_number_that_cannot_be_is_left_out(offset):
    _flags, slots, offsets = columns([(1, SLOT, offset), (1, SLOT, PAGES - 1)])
    for mark in variants(dirtyring._mark):
        words = new_bitmap(PAGES)
        assert mark(slots, offsets, SLOT, words, PAGES) == 2
        assert page_numbers(words).tolist() == [PAGES - 1]
