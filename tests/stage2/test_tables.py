"""Mapping: descriptors, sizes, dissolving and rebuilding blocks, accounts."""

import pytest
from tests.stage2.support import POOL_PA, RAM_PA, WRITE, access, make, read, write

from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import Outcome
from sterna.stage2.tables import OutOfTablesError
from sterna.testing.flush import RecordingFlush

RAM = Ipa(0x4000_0000)


@pytest.fixture
def stage2():
    stage2 = make()
    yield stage2
    stage2.validate()


def logged(stage2, pages, ipa=RAM, **arguments):
    return DirtyLog(stage2, RecordingFlush(), 0, ipa, pages, **arguments)


def test_descriptors_are_the_architectures(stage2):
    """ARM DDI 0406C.c, B3.6.1 and B3.6.2: write-back, inner shareable, accessed."""
    stage2.insert_slot(0, RAM, 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    assert stage2.entry(RAM) == (RAM_PA | 0x7FD, 2)
    stage2.protect(RAM, PAGE_SIZE)
    assert stage2.entry(RAM) == (RAM_PA | 0x77D, 2)
    logged(stage2, 1024)
    write(stage2, RAM + PAGE_SIZE)
    assert stage2.entry(Ipa(RAM + PAGE_SIZE)) == (RAM_PA + PAGE_SIZE | 0x7FF, 3)
    assert stage2.entry(RAM) == (RAM_PA | 0x77F, 3)


def test_root_is_two_concatenated_tables(stage2):
    """A 40-bit IPA: 1024 level-1 entries; the last GiB is reached, the first address behind it is nobody's."""
    assert stage2.root_pa == POOL_PA
    last = Ipa((1 << 40) - PUD_SIZE)
    stage2.insert_slot(0, last, PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, last)
    assert stage2.entry(last)[1] == 2
    assert stage2.fault(Ipa(1 << 40)) is Outcome.NO_SLOT


def test_population_is_lazy(stage2):
    stage2.insert_slot(0, RAM, 8 * PMD_SIZE, RAM_PA, readonly=False)
    assert stage2.statistics()["tables"] == 0
    read(stage2, RAM + 3 * PMD_SIZE)
    assert stage2.statistics()["blocks_2m"] == 1
    assert stage2.statistics()["faults_translation"] == 1


@pytest.mark.parametrize(
    ("ipa", "size", "pa", "level"),
    [
        (RAM, 2 * PMD_SIZE, RAM_PA, 2),
        (RAM, 2 * PMD_SIZE, RAM_PA + PAGE_SIZE, 3),  # physical and guest address differ modulo 2 MiB
        (RAM + PAGE_SIZE, 2 * PMD_SIZE, RAM_PA + PAGE_SIZE, 3),  # the slot starts inside the block
        (RAM, PMD_SIZE - PAGE_SIZE, RAM_PA, 3),  # the slot ends inside the block
    ],
)
def test_blocks_only_where_alignment_allows(stage2, ipa, size, pa, level):
    stage2.insert_slot(0, Ipa(ipa), size, pa, readonly=False)
    write(stage2, ipa)
    entry, found = stage2.entry(Ipa(ipa))
    assert found == level
    assert entry & ~0xFFF == pa


def test_gigabyte_blocks_dissolve_to_pages_and_come_back():
    stage2 = make(max_leaf=PUD_SIZE)
    stage2.insert_slot(0, RAM, PUD_SIZE, 0x40_0000_0000, readonly=False)
    write(stage2, RAM)
    assert stage2.entry(RAM)[1] == 1
    log = logged(stage2, PUD_SIZE // PAGE_SIZE)
    assert not stage2.entry(RAM)[0] & WRITE
    write(stage2, RAM + 5 * PMD_SIZE + PAGE_SIZE)
    stage2.validate()
    statistics = stage2.statistics()
    assert (statistics["blocks_1g"], statistics["blocks_2m"], statistics["pages_4k"]) == (0, 511, 512)
    log.disable()
    write(stage2, RAM)
    stage2.validate()
    statistics = stage2.statistics()
    assert (statistics["blocks_1g"], statistics["blocks_2m"], statistics["pages_4k"]) == (1, 0, 0)
    assert statistics["tables"] == 0


def test_logged_write_dissolves_its_block(stage2):
    stage2.insert_slot(0, RAM, 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + PMD_SIZE)
    log = logged(stage2, 1024)
    write(stage2, RAM + 7 * PAGE_SIZE)
    statistics = stage2.statistics()
    assert statistics["blocks_dissolved"] == 1
    assert statistics["blocks_2m"] == 1
    assert statistics["pages_4k"] == 512
    assert statistics["tlbi_posted"] == 1
    writable = [page for page in range(512) if stage2.entry(Ipa(RAM + page * PAGE_SIZE))[0] & WRITE]
    assert writable == [7]
    # The other 511 pages are mapped, and not dirty.
    assert int(log.get()[0]) == 1 << 7


def test_reads_leave_blocks_whole(stage2):
    stage2.insert_slot(0, RAM, PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    log = logged(stage2, 512)
    read(stage2, RAM + PAGE_SIZE)
    assert stage2.statistics()["blocks_dissolved"] == 0
    assert not log.get().any()


def test_absent_memory_is_tracked_by_page_while_logging(stage2):
    stage2.insert_slot(0, RAM, PMD_SIZE + 3 * PAGE_SIZE, RAM_PA, readonly=False)
    log = logged(stage2, 515)
    read(stage2, RAM)
    assert stage2.entry(RAM)[1] == 3
    write(stage2, RAM + PMD_SIZE + 2 * PAGE_SIZE)
    assert stage2.statistics()["pages_4k"] == 512 + 3
    words = log.get()
    assert [int(word) for word in words] == [0] * 8 + [1 << 2]


def test_3c3736cd_blocks_are_rebuilt_whole_after_logging(stage2):
    """Linux 3c3736cd32bf: the table of a block rebuilt after a cancelled migration is freed, and the TLB told."""
    stage2.insert_slot(0, RAM, PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    log = logged(stage2, 512)
    for page in range(0, 512, 3):
        write(stage2, RAM + page * PAGE_SIZE)
    log.get()
    log.disable()
    before = stage2.statistics()
    assert before["blocks_2m"] == 0  # disabling walked nothing
    write(stage2, RAM + 5 * PAGE_SIZE)
    after = stage2.statistics()
    assert after["blocks_rebuilt"] == 1
    assert (after["blocks_2m"], after["pages_4k"]) == (1, 0)
    assert after["tables"] == before["tables"] - 1
    assert after["tlbi_posted"] == before["tlbi_posted"] + 1
    assert stage2.entry(RAM) == (RAM_PA | 0x7FD, 2)


def test_readonly_slot(stage2):
    stage2.insert_slot(0, RAM, PMD_SIZE, RAM_PA, readonly=True)
    read(stage2, RAM)
    assert not stage2.entry(RAM)[0] & WRITE
    assert access(stage2, RAM, write=True) is Outcome.READONLY
    logged(stage2, 512)
    assert access(stage2, RAM, write=True) is Outcome.READONLY


def test_readonly_slot_keeps_its_blocks_while_logging(stage2):
    """Linux, memslot_is_logging: a slot that nobody can write needs no tracking by page."""
    stage2.insert_slot(0, RAM, PMD_SIZE, RAM_PA, readonly=True)
    logged(stage2, 512)
    read(stage2, RAM)
    assert stage2.entry(RAM)[1] == 2


def test_no_slot_no_mapping(stage2):
    assert stage2.fault(RAM) is Outcome.NO_SLOT
    assert stage2.statistics()["faults_unhandled"] == 1


def test_access_flag_faults_after_aging(stage2):
    stage2.insert_slot(0, RAM, 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + PMD_SIZE)
    assert stage2.age(RAM, 2 * PMD_SIZE) == 2
    assert stage2.age(RAM, 2 * PMD_SIZE) == 0
    read(stage2, RAM)
    assert stage2.statistics()["faults_access_flag"] == 1
    assert stage2.entry(RAM)[0] & WRITE  # permissions survive aging
    assert stage2.age(RAM, 2 * PMD_SIZE) == 1


def test_dissolving_an_old_block_keeps_it_old(stage2):
    stage2.insert_slot(0, RAM, PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    log = logged(stage2, 512)
    stage2.age(RAM, PMD_SIZE)
    write(stage2, RAM)
    read(stage2, RAM + PAGE_SIZE)
    assert int(log.get()[0]) == 1


def test_unmapping_one_page_takes_its_block(stage2):
    stage2.insert_slot(0, RAM, 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + PMD_SIZE)
    stage2.unmap(Ipa(RAM + PAGE_SIZE), PAGE_SIZE)
    assert stage2.entry(RAM)[0] == 0
    assert stage2.statistics()["blocks_2m"] == 1
    write(stage2, RAM)
    assert stage2.statistics()["blocks_2m"] == 2


def test_deleted_slot_leaves_no_table(stage2):
    stage2.insert_slot(0, RAM, 3 * PMD_SIZE + 5 * PAGE_SIZE, RAM_PA, readonly=False)
    logged(stage2, 3 * 512 + 5)
    for page in range(0, 3 * 512 + 5, 7):
        write(stage2, RAM + page * PAGE_SIZE)
    stage2.remove_slot(0)
    statistics = stage2.statistics()
    assert (statistics["tables"], statistics["pages_4k"], statistics["blocks_2m"]) == (0, 0, 0)
    assert stage2.fault(RAM) is Outcome.NO_SLOT


def test_neighbouring_slots_in_one_block_keep_apart(stage2):
    half = PMD_SIZE // 2
    stage2.insert_slot(0, RAM, half, RAM_PA, readonly=False)
    stage2.insert_slot(1, Ipa(RAM + half), half, RAM_PA + PUD_SIZE, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + half)
    stage2.remove_slot(0)
    assert stage2.entry(RAM)[0] == 0
    assert stage2.entry(Ipa(RAM + half))[0] & ~0xFFF == RAM_PA + PUD_SIZE


def test_tables_do_not_leak_over_a_thousand_cycles(stage2):
    stage2.insert_slot(0, RAM, 4 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, RAM)
    start = stage2.statistics()["tables"], stage2.free_tables
    for cycle in range(1000):
        log = logged(stage2, 2048)
        for block in range(4):
            write(stage2, RAM + block * PMD_SIZE + cycle % 512 * PAGE_SIZE)
        log.get()
        log.disable()
        for block in range(4):
            write(stage2, RAM + block * PMD_SIZE)
    assert (stage2.statistics()["tables"], stage2.free_tables) == start
    assert stage2.statistics()["blocks_rebuilt"] == 4000


@pytest.mark.parametrize("size", [0, -PAGE_SIZE, PAGE_SIZE, 2 * PAGE_SIZE, 3 * PAGE_SIZE - 8])
def test_a_pool_has_room_beside_the_root(size):
    with pytest.raises(ValueError, match=f"a pool of {size} bytes: it has whole pages"):
        make(pool_size=size)
    assert make(pool_size=3 * PAGE_SIZE).free_tables == 1


@pytest.mark.parametrize("cpus", [0, 9])
def test_there_is_room_for_eight_cpus(cpus):
    with pytest.raises(ValueError, match="1 to 8 are possible"):
        make(cpus=cpus)
    make(cpus=8)


def test_pool_used_up():
    stage2 = make(pool_size=5 * PAGE_SIZE)  # the root's two pages, and three
    stage2.insert_slot(0, RAM, 4 * PMD_SIZE, RAM_PA + PAGE_SIZE, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + PMD_SIZE)
    assert access(stage2, RAM + 2 * PMD_SIZE, write=True) is Outcome.NO_MEMORY
    stage2.validate()
    with pytest.raises(OutOfTablesError, match="0x9000000"):
        stage2.map_device(Ipa(0x900_0000), PAGE_SIZE, 0)
