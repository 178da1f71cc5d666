"""Ranges: whatever their ends, as much is changed as they touch and no more, and all of it is counted."""

from itertools import combinations

import numpy as np
import pytest
from tests.stage2.support import GEOMETRIES, RAM_PA, read, write

from sterna.memory.address import Ipa
from sterna.memory.bitmap import new_bitmap, page_numbers
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.state import MAX_SLOTS
from sterna.stage2.tables import OutOfTablesError
from sterna.testing.flush import RecordingFlush

LARGE_PA = 0x40_0000_0000
EDGES = ((0, 0, 0), (1, 0, -1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 2, -1), (1, 2, 0))
EDGES += ((1, 2, 5), (1, 3, -1), (1, 3, 0), (1, 4, -1), (1, 4, 0))
"""Of the memory of `Mapped`: so many large blocks, blocks and pages from its start."""
RANGES = list(combinations(EDGES, 2))


class Mapped:
    """Leaves of all three sizes, all of them writable: the third GiB in one, then two blocks of 2 MiB, then two in pages.

    :ivar leaves: first byte and end of each
    """

    def __init__(self, geometry):
        self.geometry = geometry
        self.stage2 = geometry.make(max_leaf=geometry.large, pool_size=geometry.pool(16))
        self.start = 2 * geometry.large
        self.blocks, self.paged, self.end = (self.at((1, blocks, 0)) for blocks in (0, 2, 4))
        for number, (at, end, pa) in enumerate(
            (
                (self.start, self.blocks, LARGE_PA),
                (self.blocks, self.paged, RAM_PA),
                (self.paged, self.end, RAM_PA + geometry.large + geometry.page),
            )
        ):
            self.stage2.insert_slot(number, Ipa(at), end - at, pa, readonly=False)
        self.leaves = [(self.start, self.blocks)]
        self.leaves += [(at, at + geometry.block) for at in range(self.blocks, self.paged, geometry.block)]
        self.leaves += [(at, at + geometry.page) for at in range(self.paged, self.end, geometry.page)]
        for at, _ in self.leaves:
            write(self.stage2, at)

    def at(self, edge):
        large, blocks, pages = edge
        return (
            self.start
            + large * self.geometry.large
            + blocks * self.geometry.block
            + pages * self.geometry.page
        )

    def touched(self, start, end):
        return [leaf for leaf in self.leaves if leaf[0] < end and leaf[1] > start]

    def entries(self):
        return [self.stage2.entry(Ipa(start))[0] for start, _ in self.leaves]

    def sizes(self, leaves):
        """How many of each size: large blocks, blocks, pages."""
        sizes = [end - start for start, end in leaves]
        return [sizes.count(size) for size in (self.geometry.large, self.geometry.block, self.geometry.page)]

    def unmap(self, start, end):
        """Unmap a range, and look at what is left."""
        touched = self.touched(start, end)
        self.stage2.unmap(Ipa(start), end - start)
        assert [bool(entry) for entry in self.entries()] == [leaf not in touched for leaf in self.leaves]
        left = [leaf for leaf in self.leaves if leaf not in touched]
        large, blocks, pages = self.sizes(left)
        assert self.geometry.counts(self.stage2) == [large, blocks, pages]
        # A table for the fourth GiB while anything is mapped there, and one for each 2 MiB of pages.
        tables = len({leaf[0] // self.geometry.block for leaf in left if leaf[0] >= self.paged})
        tables += bool(blocks or pages) + self.geometry.upper * bool(left)
        assert self.stage2.statistics()["tables"] == tables

    def protect(self, start, end):
        """Protect a range, and look at what is read-only."""
        touched, before = self.touched(start, end), self.entries()
        self.stage2.protect(Ipa(start), end - start)
        for leaf, entry, was in zip(self.leaves, self.entries(), before, strict=True):
            assert entry == (was & ~self.geometry.format.write if leaf in touched else was)
        large, blocks, pages = self.sizes(touched)
        assert self.stage2.statistics()["blocks_protected"] == large + blocks
        assert self.stage2.statistics()["pages_protected"] == pages

    def age(self, start, end):
        """Age a range, and look at what is old."""
        touched, before = self.touched(start, end), self.entries()
        assert self.stage2.age(Ipa(start), end - start) == len(touched)
        for leaf, entry, was in zip(self.leaves, self.entries(), before, strict=True):
            assert entry == (was & ~self.geometry.format.access if leaf in touched else was)


@pytest.fixture
def mapped(geometry):
    mapped = Mapped(geometry)
    yield mapped
    mapped.stage2.validate()


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_a_range_goes_with_the_leaves_it_touches(mapped, start, end):
    start, end = mapped.at(start), mapped.at(end)
    mapped.unmap(start, end)
    statistics = mapped.stage2.statistics()
    mapped.stage2.unmap(Ipa(start), end - start)
    assert mapped.stage2.statistics() == statistics


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_a_range_is_protected_with_the_leaves_it_touches(mapped, start, end):
    start, end = mapped.at(start), mapped.at(end)
    mapped.protect(start, end)
    statistics = mapped.stage2.statistics()
    mapped.stage2.protect(Ipa(start), end - start)
    assert mapped.stage2.statistics() == statistics, "they were read-only already"


@pytest.mark.parametrize(("start", "end"), RANGES[::3])
def test_a_range_ages_with_the_leaves_it_touches(mapped, start, end):
    start, end = mapped.at(start), mapped.at(end)
    mapped.age(start, end)
    assert mapped.stage2.age(Ipa(start), end - start) == 0


SMALLEST = min(GEOMETRIES, key=lambda geometry: geometry.pages)
EVERY = 2 + 4 * SMALLEST.pages


@pytest.mark.parametrize("first", range(EVERY))
def test_every_range_of_small_tables(first):
    """From each page on, beginning with the last two of the large block, to each behind it."""
    for count in range(1, EVERY - first + 1):
        mapped = Mapped(SMALLEST)
        start = mapped.blocks + (first - 2) * SMALLEST.page
        end = start + count * SMALLEST.page
        mapped.age(start, end)
        mapped.protect(start, end)
        mapped.unmap(start, end)
        mapped.stage2.validate()


def test_a_hole_is_passed_over(mapped):
    size = 3 * mapped.geometry.large
    mapped.stage2.unmap(Ipa(mapped.end), size)
    mapped.stage2.protect(Ipa(mapped.end), size)
    assert mapped.stage2.age(Ipa(mapped.end), size) == 0
    assert mapped.stage2.statistics()["pages_protected"] == 0


WORDS = (0, 1, 1023, 1024, 1025, 2047, 2048)
"""Of the bitmap of a slot that is looked at in three turns of the lock."""
LONG = 2049 * 64 + 3
"""Pages of such a slot."""
BASE = Ipa(0x8000_0000)


def page(stage2, number):
    return Ipa(BASE + number * stage2.format.page_size)


@pytest.fixture
def long(geometry):
    """A slot of 2049 words and three pages in pages, some of them written, and its log."""
    stage2 = geometry.make()
    stage2.insert_slot(0, BASE, LONG * geometry.page, RAM_PA + geometry.page, readonly=False)
    written = sorted({*(64 * word + bit for word in WORDS for bit in (0, 63)), LONG - 1})
    yield stage2, written
    stage2.validate()


def writable(stage2, pages):
    return [bool(stage2.entry(page(stage2, number))[0] & stage2.format.write) for number in pages]


def test_a_long_log_is_taken_whole(long):
    stage2, written = long
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, LONG)
    for number in written:
        write(stage2, page(stage2, number))
    assert list(page_numbers(log.peek())) == written
    assert list(page_numbers(log.get())) == written
    assert not any(writable(stage2, written))
    assert stage2.statistics()["pages_protected"] == len(written)
    assert not log.get().any()


def test_a_long_log_is_cleared_where_it_is_asked_to_be(long):
    stage2, written = long
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, LONG, manual_protect=True)
    for number in written:
        write(stage2, page(stage2, number))
    mask = log.get()
    mask[[1, 1024]] = 0
    log.clear(64, LONG - 64, mask[1:])
    left = [number for number in written if number // 64 in (0, 1, 1024)]
    assert list(page_numbers(log.get())) == left
    assert writable(stage2, written) == [number in left for number in written]


@pytest.mark.parametrize("first", [0, 1, 63, 64, 127])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 128, 129])
def test_host_writes_mark_their_pages(first, count):
    bitmap = new_bitmap(320)
    stage2 = SMALLEST.make()
    stage2.mark(bitmap, first, count)
    assert list(page_numbers(bitmap)) == list(range(first, first + count))
    stage2.mark(bitmap, 300, 1)
    assert list(page_numbers(bitmap)) == [*range(first, first + count), 300]


def test_a_log_goes_on_where_its_slot_has_moved(geometry, long):
    stage2, written = long
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, LONG)
    log.mark(5, 70)
    for number in written:
        write(stage2, page(stage2, number))
    stage2.remove_slot(0)
    other = Ipa(BASE + 2 * geometry.large)
    stage2.insert_slot(
        0, other, LONG * geometry.page, RAM_PA + geometry.page, readonly=False, bitmap=log.move(other)
    )
    write(stage2, other + 100 * geometry.page)
    assert list(page_numbers(log.get())) == sorted({*written, *range(5, 75), 100})
    write(stage2, other + 100 * geometry.page)
    assert list(page_numbers(log.get())) == [100]


def test_slots_are_found_by_number_and_address(geometry):
    stage2 = geometry.make()
    size = geometry.block
    for number in range(MAX_SLOTS):
        stage2.insert_slot(number, Ipa(number * size), size, RAM_PA + number * size, readonly=False)
    with pytest.raises(OutOfTablesError, match=f"memory slot 32: at most {MAX_SLOTS} slots"):
        stage2.insert_slot(32, BASE, size, RAM_PA, readonly=False)
    for number in (0, 31, 7):
        stage2.remove_slot(number)
        with pytest.raises(KeyError):
            stage2.remove_slot(number)
    for number in set(range(MAX_SLOTS)) - {0, 31, 7}:
        read(stage2, (number + 1) * size - geometry.page)
        assert stage2.entry(Ipa(number * size))[0] & geometry.format.address == RAM_PA + number * size
    for number in (0, 31, 7, 32):
        assert stage2.fault(Ipa(number * size)).name == "NO_SLOT"
    stage2.validate()


def test_devices_are_mapped_page_by_page(geometry):
    stage2 = geometry.make()
    device, size = geometry.format.device, geometry.page
    end = Ipa(BASE + geometry.block)
    stage2.map_device(Ipa(end - size), 2 * size, 0x900_0000)
    assert stage2.entry(Ipa(end - size)) == (device | 0x900_0000, 3)
    assert stage2.entry(end) == (device | 0x900_0000 + size, 3)
    assert stage2.entry(Ipa(end + size)) == (0, 3)
    assert stage2.entry(Ipa(BASE + 2 * geometry.block)) == (0, 2)
    assert geometry.counts(stage2) == [0, 0, 2]
    assert stage2.statistics()["tables"] == geometry.upper + 3
    stage2.map_device(end, size, 0x900_0000 + 2 * size)
    assert stage2.entry(end)[0] & geometry.format.address == 0x900_0000 + 2 * size
    assert geometry.counts(stage2) == [0, 0, 2]
    stage2.validate()


def use_a_table(geometry, stage2):
    """A block of 2 MiB in the first GiB takes one, which no other GiB has a use for."""
    stage2.insert_slot(9, Ipa(0), geometry.block, RAM_PA, readonly=False)
    write(stage2, 0)


@pytest.mark.parametrize("free", [0, 1])
def test_a_device_needs_two_tables(geometry, free):
    stage2 = geometry.make(pool_size=geometry.pool(geometry.upper + 1 + free))
    use_a_table(geometry, stage2)
    at = Ipa(2 * geometry.large)
    with pytest.raises(OutOfTablesError, match=f"no page-table page left to map a device at {at:#x}"):
        stage2.map_device(at, geometry.page, 0x900_0000)
    assert stage2.free_tables == free
    assert geometry.counts(stage2)[2] == 0
    stage2.validate()


def test_a_device_is_mapped_whole_or_not_at_all(geometry):
    """Its second page needs a table more than there are."""
    stage2 = geometry.make(pool_size=geometry.pool(geometry.upper + 3))
    use_a_table(geometry, stage2)
    at = Ipa(2 * geometry.large + geometry.block - geometry.page)
    with pytest.raises(OutOfTablesError, match=f"no page-table page left to map a device at {at:#x}"):
        stage2.map_device(at, 2 * geometry.page, 0x900_0000)
    assert stage2.entry(at)[0] == 0
    assert (geometry.counts(stage2)[2], stage2.free_tables) == (0, 2)
    stage2.validate()


@pytest.mark.parametrize("level", [1, 2])
def test_without_a_table_a_block_stays_whole_and_read_only(geometry, level):
    stage2 = geometry.make(max_leaf=geometry.large, pool_size=geometry.pool(geometry.upper + level))
    use_a_table(geometry, stage2)
    size = geometry.large if level == 1 else geometry.block
    at = Ipa(2 * geometry.large)
    stage2.insert_slot(0, at, size, LARGE_PA, readonly=False)
    write(stage2, at)
    log = DirtyLog(stage2, RecordingFlush(), 0, at, size // geometry.page)
    assert stage2.fault(at).name == "NO_MEMORY"
    assert stage2.entry(at)[1] == level
    assert not geometry.writable(stage2, at)
    assert not log.get().any()
    stage2.validate()


def test_the_first_gib_and_the_last_are_reached_and_nothing_behind(geometry):
    stage2 = geometry.make(max_leaf=geometry.large)
    for number, at in enumerate((0, geometry.end - geometry.large)):
        stage2.insert_slot(number, Ipa(at), geometry.large, LARGE_PA, readonly=False)
        write(stage2, at + geometry.large - geometry.page)
        assert stage2.entry(Ipa(at))[1] == 1
    end = Ipa(geometry.end)
    assert stage2.entry(end) == (0, geometry.format.root_level)
    stage2.insert_slot(2, end, geometry.large, 0, readonly=False)
    assert stage2.fault(end).name == "NO_SLOT"
    stage2.validate()


def test_each_cpu_owes_a_flush_once_a_block_is_broken(geometry):
    stage2 = geometry.make(cpus=3)
    stage2.insert_slot(0, BASE, geometry.block, RAM_PA, readonly=False)
    write(stage2, BASE)
    DirtyLog(stage2, RecordingFlush(), 0, BASE, geometry.pages)
    assert not stage2.tlbi_pending.any()
    write(stage2, BASE)
    assert list(stage2.tlbi_pending) == [1, 1, 1, *np.zeros(5)]
    counts = stage2.statistics()
    told = {"faults_translation": 1, "faults_permission": 1, "dirty_marked": 1, "blocks_protected": 1}
    told |= {"blocks_dissolved": 1, geometry.leaves[2]: geometry.pages, "tables": 2 + geometry.upper}
    told |= {"tlbi_posted": 1}
    assert counts == dict.fromkeys(counts, 0) | told
