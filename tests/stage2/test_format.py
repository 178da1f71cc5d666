"""Formats: which geometries there can be, and that a walk goes through all levels of each."""

import re
from dataclasses import replace
from itertools import pairwise

import pytest
from tests.stage2.support import MADE_UP, POOL_PA, RAM_PA

from sterna.arch.armv7 import stage2 as armv7
from sterna.memory.address import Ipa
from sterna.memory.bitmap import page_numbers
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.tables import Stage2
from sterna.testing.flush import RecordingFlush

GEOMETRIES = [
    (29, 16),  # two levels, tables of 64 KiB
    (30, 21, 12),
    (39, 30, 21, 12),
    (47, 36, 25, 14),
    (33, 30, 28, 25, 21, 17, 14),
]


@pytest.mark.parametrize("shifts", GEOMETRIES, ids=str)
def test_a_page_is_reached_through_all_levels(shifts):
    """Each table is found by its own bits of the address: looked at without the walk of the sources."""
    form = replace(MADE_UP, shifts=shifts, root_entries=16, largest_leaf=1 << shifts[-2])
    stage2 = Stage2(form, POOL_PA, pool_size=64 * form.table_size)
    page = form.page_size
    indices = [5, *((1 << above - below) - 3 for above, below in pairwise(shifts))]
    ipa = Ipa(sum(index << shift for index, shift in zip(indices, shifts, strict=True)))
    stage2.insert_slot(0, Ipa(ipa - page), 3 * page, RAM_PA, readonly=False)
    log = DirtyLog(stage2, RecordingFlush(), 0, Ipa(ipa - page), 3)
    for _ in range(2):  # absent, then read-only
        stage2.fault(ipa)
    at = 0
    for index in indices[:-1]:
        entry = int(stage2.tables[at + index])
        assert entry & form.kind == form.table
        at = ((entry & form.address) - POOL_PA) // 8
        assert at > 0
        assert at % (form.table_size // 8) == 0
    written = RAM_PA + page | form.page | form.write
    assert int(stage2.tables[at + indices[-1]]) == written
    assert stage2.entry(ipa) == (written, 3)
    assert stage2.statistics()["tables"] == len(shifts) - 1
    assert page_numbers(log.get()).tolist() == [1]
    assert stage2.entry(ipa) == (written & ~form.write, 3)
    stage2.validate()
    stage2.unmap(Ipa(ipa - page), 3 * page)
    assert not stage2.tables[:16].any()
    assert stage2.statistics()["tables"] == 0
    stage2.validate()


def test_statistics_name_leaves_by_their_size():
    def names(shifts):
        form = replace(armv7.FORMAT, shifts=shifts, largest_leaf=1 << shifts[-2])
        return [name for name in Stage2(form, POOL_PA).statistics() if re.match(r"(pages|blocks)_\d", name)]

    assert names((30, 21, 12)) == names((39, 30, 21, 12)) == ["pages_4k", "blocks_2m", "blocks_1g"]
    assert names((47, 36, 25, 14)) == ["pages_16k", "blocks_32m", "blocks_64g"]
    assert names((29, 16)) == ["pages_64k", "blocks_512m"]


@pytest.mark.parametrize(
    "shifts", [(), (12,), (30, 21, 21), (12, 21), (60, 50, 45, 40, 35, 30, 21, 12)], ids=str
)
def test_levels_that_there_cannot_be(shifts):
    with pytest.raises(ValueError, match="there are 2 to 7"):
        replace(armv7.FORMAT, shifts=shifts)


@pytest.mark.parametrize("bits", [{"kind": 0b10}, {"table": 0b10}, {"present": 0b100}])
def test_a_table_is_told_from_what_is_absent(bits):
    with pytest.raises(ValueError, match="are not told by the bits"):
        replace(armv7.FORMAT, **bits)


@pytest.mark.parametrize("size", [0, 3 << 21, 1 << 39])
def test_a_largest_leaf_is_one_of_the_last_three_levels(size):
    with pytest.raises(ValueError, match="it is one of level 1, 2 or 3"):
        replace(armv7.FORMAT, shifts=(39, 30, 21, 12), largest_leaf=size)


def test_no_leaf_is_larger_than_the_format_has():
    form = replace(armv7.FORMAT, shifts=(39, 30, 21, 12), root_entries=512, largest_leaf=1 << 21)
    stage2 = Stage2(form, POOL_PA, max_leaf=1 << 30)
    stage2.insert_slot(0, Ipa(0), 1 << 30, RAM_PA, readonly=False)
    stage2.fault(Ipa(0))
    assert stage2.entry(Ipa(0))[1] == 2
