"""Ranges: whatever their ends, as much is changed as they touch and no more, and all of it is counted."""

import numpy as np
import pytest
from tests.stage2.support import ACCESS, RAM_PA, WRITE, make, read, write

from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.memory.bitmap import new_bitmap, page_numbers
from sterna.stage2 import armv7
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.state import MAX_SLOTS
from sterna.stage2.tables import OutOfTablesError
from sterna.testing.flush import RecordingFlush

BASE = Ipa(0x8000_0000)
"""The third GiB: a block of 1 GiB, then blocks of 2 MiB up to `PAGED`, then pages."""
BLOCKS = BASE + PUD_SIZE
PAGED = BLOCKS + 2 * PMD_SIZE
END = PAGED + 2 * PMD_SIZE
EDGES = (BASE, BLOCKS - PAGE_SIZE, BLOCKS, BLOCKS + PAGE_SIZE, BLOCKS + PMD_SIZE, PAGED - PAGE_SIZE, PAGED)
EDGES += (PAGED + 5 * PAGE_SIZE, PAGED + PMD_SIZE - PAGE_SIZE, PAGED + PMD_SIZE, END - PAGE_SIZE, END)
RANGES = [(start, end) for start in EDGES for end in EDGES if start < end]


@pytest.fixture
def mapped():
    """Leaves of all three sizes, all of them writable, and what they map."""
    stage2 = make(max_leaf=PUD_SIZE)
    stage2.insert_slot(0, BASE, PUD_SIZE, 0x40_0000_0000, readonly=False)
    stage2.insert_slot(1, Ipa(BLOCKS), 2 * PMD_SIZE, RAM_PA, readonly=False)
    stage2.insert_slot(2, Ipa(PAGED), 2 * PMD_SIZE, RAM_PA + PUD_SIZE + PAGE_SIZE, readonly=False)
    write(stage2, BASE)
    for at in range(BLOCKS, PAGED, PMD_SIZE):
        write(stage2, at)
    for at in range(PAGED, END, PAGE_SIZE):
        write(stage2, at)
    leaves = [(BASE, BLOCKS), *((at, at + PMD_SIZE) for at in range(BLOCKS, PAGED, PMD_SIZE))]
    leaves += [(at, at + PAGE_SIZE) for at in range(PAGED, END, PAGE_SIZE)]
    yield stage2, leaves
    stage2.validate()


def kinds(leaves):
    """How many of each size: 1 GiB, 2 MiB, 4 KiB."""
    sizes = [end - start for start, end in leaves]
    return [sizes.count(size) for size in (PUD_SIZE, PMD_SIZE, PAGE_SIZE)]


def entries(stage2, leaves):
    return [stage2.entry(Ipa(start))[0] for start, _ in leaves]


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_a_range_goes_with_the_leaves_it_touches(mapped, start, end):
    stage2, leaves = mapped
    touched = [leaf for leaf in leaves if leaf[0] < end and leaf[1] > start]
    stage2.unmap(Ipa(start), end - start)
    assert [bool(entry) for entry in entries(stage2, leaves)] == [leaf not in touched for leaf in leaves]
    left = kinds([leaf for leaf in leaves if leaf not in touched])
    statistics = stage2.statistics()
    assert [statistics[name] for name in ("blocks_1g", "blocks_2m", "pages_4k")] == left
    # A table for the second GiB while anything is mapped there, and one for each 2 MiB of pages.
    pages = {leaf[0] // PMD_SIZE for leaf in leaves if leaf not in touched and leaf[0] >= PAGED}
    assert statistics["tables"] == len(pages) + bool(left[1] or left[2])
    stage2.unmap(Ipa(start), end - start)
    assert stage2.statistics() == statistics


@pytest.mark.parametrize(("start", "end"), RANGES)
def test_a_range_is_protected_with_the_leaves_it_touches(mapped, start, end):
    stage2, leaves = mapped
    touched = [leaf for leaf in leaves if leaf[0] < end and leaf[1] > start]
    before = entries(stage2, leaves)
    stage2.protect(Ipa(start), end - start)
    for leaf, entry, was in zip(leaves, entries(stage2, leaves), before, strict=True):
        assert entry == (was & ~WRITE if leaf in touched else was)
    counts = kinds(touched)
    assert stage2.statistics()["blocks_protected"] == counts[0] + counts[1]
    assert stage2.statistics()["pages_protected"] == counts[2]
    stage2.protect(Ipa(start), end - start)
    assert stage2.statistics()["blocks_protected"] == counts[0] + counts[1], "they were read-only already"
    assert stage2.statistics()["pages_protected"] == counts[2]


@pytest.mark.parametrize(("start", "end"), RANGES[::3])
def test_a_range_ages_with_the_leaves_it_touches(mapped, start, end):
    stage2, leaves = mapped
    touched = [leaf for leaf in leaves if leaf[0] < end and leaf[1] > start]
    before = entries(stage2, leaves)
    assert stage2.age(Ipa(start), end - start) == len(touched)
    for leaf, entry, was in zip(leaves, entries(stage2, leaves), before, strict=True):
        assert entry == (was & ~ACCESS if leaf in touched else was)
    assert stage2.age(Ipa(start), end - start) == 0


def test_a_hole_is_passed_over(mapped):
    stage2, _ = mapped
    stage2.unmap(Ipa(END), 3 * PUD_SIZE)
    stage2.protect(Ipa(END), 3 * PUD_SIZE)
    assert stage2.age(Ipa(END), 3 * PUD_SIZE) == 0
    assert stage2.statistics()["pages_protected"] == 0


WORDS = (0, 1, 1023, 1024, 1025, 2047, 2048)
"""Of the bitmap of a slot that is looked at in three turns of the lock."""


@pytest.fixture
def long():
    """A slot of 2049 words and three pages in pages, some of them written, and its log."""
    stage2 = make()
    pages = 2049 * 64 + 3
    stage2.insert_slot(0, BASE, pages * PAGE_SIZE, RAM_PA + PAGE_SIZE, readonly=False)
    written = sorted({*(64 * word + bit for word in WORDS for bit in (0, 63)), pages - 1})
    yield stage2, pages, written
    stage2.validate()


def writable(stage2, pages):
    return [bool(stage2.entry(Ipa(BASE + page * PAGE_SIZE))[0] & WRITE) for page in pages]


def test_a_long_log_is_taken_whole(long):
    stage2, pages, written = long
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, pages)
    for page in written:
        write(stage2, BASE + page * PAGE_SIZE)
    assert list(page_numbers(log.peek())) == written
    assert list(page_numbers(log.get())) == written
    assert not any(writable(stage2, written))
    assert stage2.statistics()["pages_protected"] == len(written)
    assert not log.get().any()


def test_a_long_log_is_cleared_where_it_is_asked_to_be(long):
    stage2, pages, written = long
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, pages, manual_protect=True)
    for page in written:
        write(stage2, BASE + page * PAGE_SIZE)
    mask = log.get()
    mask[[1, 1024]] = 0
    log.clear(64, pages - 64, mask[1:])
    left = [page for page in written if page // 64 in (0, 1, 1024)]
    assert list(page_numbers(log.get())) == left
    assert writable(stage2, written) == [page in left for page in written]


@pytest.mark.parametrize("first", [0, 1, 63, 64, 127])
@pytest.mark.parametrize("count", [0, 1, 2, 63, 64, 65, 128, 129])
def test_host_writes_mark_their_pages(first, count):
    bitmap = new_bitmap(320)
    make().mark(bitmap, first, count)
    assert list(page_numbers(bitmap)) == list(range(first, first + count))
    make().mark(bitmap, 300, 1)
    assert list(page_numbers(bitmap)) == [*range(first, first + count), 300]


def test_a_log_goes_on_where_its_slot_has_moved(long):
    stage2, pages, written = long
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, pages)
    log.mark(5, 70)
    for page in written:
        write(stage2, BASE + page * PAGE_SIZE)
    stage2.remove_slot(0)
    other = Ipa(BASE + 2 * PUD_SIZE)
    stage2.insert_slot(
        0, other, pages * PAGE_SIZE, RAM_PA + PAGE_SIZE, readonly=False, bitmap=log.move(other)
    )
    write(stage2, other + 100 * PAGE_SIZE)
    assert list(page_numbers(log.get())) == sorted({*written, *range(5, 75), 100})
    write(stage2, other + 100 * PAGE_SIZE)
    assert list(page_numbers(log.get())) == [100]


def test_slots_are_found_by_number_and_address():
    stage2 = make()
    for number in range(MAX_SLOTS):
        stage2.insert_slot(
            number, Ipa(number * PMD_SIZE), PMD_SIZE, RAM_PA + number * PMD_SIZE, readonly=False
        )
    with pytest.raises(OutOfTablesError, match=f"memory slot 32: at most {MAX_SLOTS} slots"):
        stage2.insert_slot(32, BASE, PMD_SIZE, RAM_PA, readonly=False)
    for number in (0, 31, 7):
        stage2.remove_slot(number)
        with pytest.raises(KeyError):
            stage2.remove_slot(number)
    for number in set(range(MAX_SLOTS)) - {0, 31, 7}:
        read(stage2, (number + 1) * PMD_SIZE - PAGE_SIZE)
        assert stage2.entry(Ipa(number * PMD_SIZE))[0] & armv7.FORMAT.address == RAM_PA + number * PMD_SIZE
    for number in (0, 31, 7, 32):
        assert stage2.fault(Ipa(number * PMD_SIZE)).name == "NO_SLOT"
    stage2.validate()


def test_devices_are_mapped_page_by_page_for_data_only():
    """ARM DDI 0406C.c, B3.6.2: device memory, readable and writable, never executed (XN is bit 54)."""
    stage2 = make()
    end = Ipa(BASE + PMD_SIZE)
    stage2.map_device(Ipa(end - PAGE_SIZE), 2 * PAGE_SIZE, 0x900_0000)
    for at, pa in ((end - PAGE_SIZE, 0x900_0000), (end, 0x900_1000)):
        assert stage2.entry(Ipa(at)) == (0x0040_0000_0000_07C7 | pa, 3)
    assert stage2.entry(Ipa(end + PAGE_SIZE)) == (0, 3)
    assert stage2.entry(Ipa(BASE + 2 * PMD_SIZE)) == (0, 2)
    assert (stage2.statistics()["pages_4k"], stage2.statistics()["tables"]) == (2, 3)
    stage2.map_device(end, PAGE_SIZE, 0x900_2000)
    assert stage2.entry(end)[0] & armv7.FORMAT.address == 0x900_2000
    assert stage2.statistics()["pages_4k"] == 2
    stage2.validate()


def use_a_table(stage2):
    """A block of 2 MiB in the first GiB takes one."""
    stage2.insert_slot(9, Ipa(0), PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, 0)


@pytest.mark.parametrize("free", [0, 1])
def test_a_device_needs_two_tables(free):
    stage2 = make(pool_size=(3 + free) * PAGE_SIZE)
    use_a_table(stage2)
    with pytest.raises(OutOfTablesError, match=f"no page-table page left to map a device at {BASE:#x}"):
        stage2.map_device(BASE, PAGE_SIZE, 0x900_0000)
    assert stage2.free_tables == free
    assert stage2.statistics()["pages_4k"] == 0
    stage2.validate()


def test_a_device_is_mapped_whole_or_not_at_all():
    """Its second page needs a table more than there are."""
    stage2 = make(pool_size=5 * PAGE_SIZE)
    use_a_table(stage2)
    end = Ipa(BASE + PMD_SIZE)
    with pytest.raises(
        OutOfTablesError, match=f"no page-table page left to map a device at {end - PAGE_SIZE:#x}"
    ):
        stage2.map_device(Ipa(end - PAGE_SIZE), 2 * PAGE_SIZE, 0x900_0000)
    assert stage2.entry(Ipa(end - PAGE_SIZE)) == (0, 1)
    assert (stage2.statistics()["pages_4k"], stage2.free_tables) == (0, 2)
    stage2.validate()


@pytest.mark.parametrize("level", [1, 2])
def test_without_a_table_a_block_stays_whole_and_read_only(level):
    stage2 = make(max_leaf=PUD_SIZE, pool_size=(2 + level) * PAGE_SIZE)
    use_a_table(stage2)
    size = PUD_SIZE if level == 1 else PMD_SIZE
    stage2.insert_slot(0, BASE, size, 0x40_0000_0000, readonly=False)
    write(stage2, BASE)
    log = DirtyLog(stage2, RecordingFlush(), 0, BASE, size // PAGE_SIZE)
    assert stage2.fault(BASE).name == "NO_MEMORY"
    assert stage2.entry(BASE)[1] == level
    assert not stage2.entry(BASE)[0] & WRITE
    assert not log.get().any()
    stage2.validate()


def test_registers_are_the_architecture_s():
    """ARM DDI 0406C.c, B4.1.159, B4.1.160, B4.1.62."""
    assert armv7.VTCR == 0x8000_3558
    assert armv7.HCR_VM == 1
    assert armv7.vttbr(0x10_0000_0000, 3) == 0x0003_0010_0000_0000
    assert armv7.FORMAT.address == 0xFF_FFFF_F000


def test_the_first_gib_and_the_last_are_reached_and_nothing_behind():
    stage2 = make(max_leaf=PUD_SIZE)
    for number, at in enumerate((0, (1 << 40) - PUD_SIZE)):
        stage2.insert_slot(number, Ipa(at), PUD_SIZE, 0x40_0000_0000, readonly=False)
        write(stage2, at + PUD_SIZE - PAGE_SIZE)
        assert stage2.entry(Ipa(at))[1] == 1
    assert stage2.entry(Ipa(1 << 40)) == (0, 1)
    stage2.insert_slot(2, Ipa(1 << 40), PUD_SIZE, 0, readonly=False)
    assert stage2.fault(Ipa(1 << 40)).name == "NO_SLOT"
    stage2.validate()


def test_each_cpu_owes_a_flush_once_a_block_is_broken():
    stage2 = make(cpus=3)
    stage2.insert_slot(0, BASE, PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, BASE)
    DirtyLog(stage2, RecordingFlush(), 0, BASE, 512)
    assert not stage2.tlbi_pending.any()
    write(stage2, BASE)
    assert list(stage2.tlbi_pending) == [1, 1, 1, *np.zeros(5)]
    counts = stage2.statistics()
    told = {"faults_translation": 1, "faults_permission": 1, "dirty_marked": 1, "blocks_protected": 1}
    told |= {"blocks_dissolved": 1, "pages_4k": 512, "tables": 2, "tlbi_posted": 1}
    assert counts == dict.fromkeys(counts, 0) | told
