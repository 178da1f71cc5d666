"""Mapping: sizes, dissolving and rebuilding blocks, accounts."""

import pytest
from tests.stage2.support import RAM_PA, access, read, write

from sterna.memory.address import Ipa
from sterna.memory.bitmap import page_numbers
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import FaultResult
from sterna.stage2.tables import OutOfTablesError
from sterna.testing.flush import RecordingFlush

RAM = Ipa(0x4000_0000)


@pytest.fixture
def stage2(geometry):
    stage2 = geometry.make()
    yield stage2
    stage2.validate()


def logged(stage2, pages, ipa=RAM, **arguments):
    return DirtyLog(stage2, RecordingFlush(), 0, ipa, pages, **arguments)


def test_population_is_lazy(geometry, stage2):
    stage2.insert_slot(0, RAM, 8 * geometry.block, RAM_PA, readonly=False)
    assert stage2.statistics()["tables"] == 0
    read(stage2, RAM + 3 * geometry.block)
    assert geometry.counts(stage2) == [0, 1, 0]
    assert stage2.statistics()["faults_translation"] == 1


@pytest.mark.parametrize(
    ("before", "size", "physically_before", "level"),
    [
        (0, (2, 0), 0, 2),
        (0, (2, 0), 1, 3),  # physical and guest address differ modulo 2 MiB
        (1, (2, 0), 1, 3),  # the slot starts inside the block
        (0, (1, -1), 0, 3),  # the slot ends inside the block
    ],
)
def test_blocks_only_where_alignment_allows(geometry, stage2, before, size, physically_before, level):
    blocks, pages = size
    ipa, pa = Ipa(RAM + before * geometry.page), RAM_PA + physically_before * geometry.page
    stage2.insert_slot(0, ipa, blocks * geometry.block + pages * geometry.page, pa, readonly=False)
    write(stage2, ipa)
    entry, found = stage2.entry(ipa)
    assert found == level
    assert entry & geometry.format.address == pa


def test_gigabyte_blocks_dissolve_to_pages_and_come_back(geometry):
    stage2 = geometry.make(max_leaf=geometry.large)
    stage2.insert_slot(0, RAM, geometry.large, 0x40_0000_0000, readonly=False)
    write(stage2, RAM)
    assert stage2.entry(RAM)[1] == 1
    log = logged(stage2, geometry.large // geometry.page)
    assert not geometry.writable(stage2, RAM)
    write(stage2, RAM + 5 * geometry.block + geometry.page)
    stage2.validate()
    assert geometry.counts(stage2) == [0, geometry.blocks - 1, geometry.pages]
    log.disable()
    write(stage2, RAM)
    stage2.validate()
    assert geometry.counts(stage2) == [1, 0, 0]
    assert stage2.statistics()["tables"] == geometry.upper


def test_logged_write_dissolves_its_block(geometry, stage2):
    stage2.insert_slot(0, RAM, 2 * geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + geometry.block)
    log = logged(stage2, 2 * geometry.pages)
    write(stage2, RAM + 7 * geometry.page)
    statistics = stage2.statistics()
    assert statistics["blocks_dissolved"] == 1
    assert geometry.counts(stage2) == [0, 1, geometry.pages]
    assert statistics["tlbi_posted"] == 1
    writable = [
        page for page in range(geometry.pages) if geometry.writable(stage2, RAM + page * geometry.page)
    ]
    assert writable == [7]
    # The other 511 pages are mapped, and not dirty.
    assert int(log.get()[0]) == 1 << 7


def test_reads_leave_blocks_whole(geometry, stage2):
    stage2.insert_slot(0, RAM, geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    log = logged(stage2, geometry.pages)
    read(stage2, RAM + geometry.page)
    assert stage2.statistics()["blocks_dissolved"] == 0
    assert not log.get().any()


def test_absent_memory_is_tracked_by_page_while_logging(geometry, stage2):
    stage2.insert_slot(0, RAM, geometry.block + 3 * geometry.page, RAM_PA, readonly=False)
    log = logged(stage2, geometry.pages + 3)
    read(stage2, RAM)
    assert stage2.entry(RAM)[1] == 3
    write(stage2, RAM + geometry.block + 2 * geometry.page)
    assert geometry.counts(stage2) == [0, 0, geometry.pages + 3]
    assert page_numbers(log.get()).tolist() == [geometry.pages + 2]


def test_3c3736cd_blocks_are_rebuilt_whole_after_logging(geometry, stage2):
    """Linux 3c3736cd32bf: the table of a block rebuilt after a cancelled migration is freed, and the TLB told."""
    stage2.insert_slot(0, RAM, geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    log = logged(stage2, geometry.pages)
    for page in range(0, geometry.pages, 3):
        write(stage2, RAM + page * geometry.page)
    log.get()
    log.disable()
    before = stage2.statistics()
    assert geometry.counts(stage2) == [0, 0, geometry.pages]  # disabling walked nothing
    write(stage2, RAM + 5 * geometry.page)
    after = stage2.statistics()
    assert after["blocks_rebuilt"] == 1
    assert geometry.counts(stage2) == [0, 1, 0]
    assert after["tables"] == before["tables"] - 1
    assert after["tlbi_posted"] == before["tlbi_posted"] + 1
    assert stage2.entry(RAM) == (RAM_PA | geometry.format.block | geometry.format.write, 2)


def test_readonly_slot(geometry, stage2):
    stage2.insert_slot(0, RAM, geometry.block, RAM_PA, readonly=True)
    read(stage2, RAM)
    assert not geometry.writable(stage2, RAM)
    assert access(stage2, RAM, write=True) is FaultResult.READONLY
    logged(stage2, geometry.pages)
    assert access(stage2, RAM, write=True) is FaultResult.READONLY


def test_readonly_slot_keeps_its_blocks_while_logging(geometry, stage2):
    """Linux, memslot_is_logging: a slot that nobody can write needs no tracking by page."""
    stage2.insert_slot(0, RAM, geometry.block, RAM_PA, readonly=True)
    logged(stage2, geometry.pages)
    read(stage2, RAM)
    assert stage2.entry(RAM)[1] == 2


def test_no_slot_no_mapping(stage2):
    assert stage2.fault(RAM) is FaultResult.NO_SLOT
    assert stage2.statistics()["faults_unhandled"] == 1


def test_access_flag_faults_after_aging(geometry, stage2):
    stage2.insert_slot(0, RAM, 2 * geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + geometry.block)
    assert stage2.age(RAM, 2 * geometry.block) == 2
    assert stage2.age(RAM, 2 * geometry.block) == 0
    read(stage2, RAM)
    assert stage2.statistics()["faults_access_flag"] == 1
    assert geometry.writable(stage2, RAM)  # permissions survive aging
    assert stage2.age(RAM, 2 * geometry.block) == 1


def test_dissolving_an_old_block_keeps_it_old(geometry, stage2):
    stage2.insert_slot(0, RAM, geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    log = logged(stage2, geometry.pages)
    stage2.age(RAM, geometry.block)
    write(stage2, RAM)
    read(stage2, RAM + geometry.page)
    assert int(log.get()[0]) == 1


def test_unmapping_one_page_takes_its_block(geometry, stage2):
    stage2.insert_slot(0, RAM, 2 * geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + geometry.block)
    stage2.unmap(Ipa(RAM + geometry.page), geometry.page)
    assert stage2.entry(RAM)[0] == 0
    assert geometry.counts(stage2) == [0, 1, 0]
    write(stage2, RAM)
    assert geometry.counts(stage2) == [0, 2, 0]


def test_deleted_slot_leaves_no_table(geometry, stage2):
    pages = 3 * geometry.pages + 5
    stage2.insert_slot(0, RAM, pages * geometry.page, RAM_PA, readonly=False)
    logged(stage2, pages)
    for page in range(0, pages, 7):
        write(stage2, RAM + page * geometry.page)
    stage2.remove_slot(0)
    assert geometry.counts(stage2) == [0, 0, 0]
    assert stage2.statistics()["tables"] == 0
    assert stage2.fault(RAM) is FaultResult.NO_SLOT


def test_neighbouring_slots_in_one_block_keep_apart(geometry, stage2):
    half = geometry.block // 2
    stage2.insert_slot(0, RAM, half, RAM_PA, readonly=False)
    stage2.insert_slot(1, Ipa(RAM + half), half, RAM_PA + geometry.large, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + half)
    stage2.remove_slot(0)
    assert stage2.entry(RAM)[0] == 0
    assert stage2.entry(Ipa(RAM + half))[0] & geometry.format.address == RAM_PA + geometry.large


def test_tables_do_not_leak_over_a_thousand_cycles(geometry, stage2):
    stage2.insert_slot(0, RAM, 4 * geometry.block, RAM_PA, readonly=False)
    write(stage2, RAM)
    start = stage2.statistics()["tables"], stage2.free_tables
    for cycle in range(1000):
        log = logged(stage2, 4 * geometry.pages)
        for block in range(4):
            write(stage2, RAM + block * geometry.block + cycle % geometry.pages * geometry.page)
        log.get()
        log.disable()
        for block in range(4):
            write(stage2, RAM + block * geometry.block)
    assert (stage2.statistics()["tables"], stage2.free_tables) == start
    assert stage2.statistics()["blocks_rebuilt"] == 4000


def test_a_pool_has_room_beside_the_root(geometry):
    table = geometry.format.table_size
    for size in (0, -table, geometry.pool(-1), geometry.pool(0), geometry.pool(1) - 8):
        with pytest.raises(ValueError, match=f"a pool of {size} bytes: it has whole pages"):
            geometry.make(pool_size=size)
    assert geometry.make(pool_size=geometry.pool(1)).free_tables == 1


@pytest.mark.parametrize("cpus", [0, 9])
def test_there_is_room_for_eight_cpus(geometry, cpus):
    with pytest.raises(ValueError, match="1 to 8 are possible"):
        geometry.make(cpus=cpus)
    geometry.make(cpus=8)


def test_pool_used_up(geometry):
    # The root, what is between it and the table of blocks, and three.
    stage2 = geometry.make(pool_size=geometry.pool(geometry.upper + 3))
    stage2.insert_slot(0, RAM, 4 * geometry.block, RAM_PA + geometry.page, readonly=False)
    write(stage2, RAM)
    write(stage2, RAM + geometry.block)
    assert access(stage2, RAM + 2 * geometry.block, write=True) is FaultResult.NO_MEMORY
    stage2.validate()
    with pytest.raises(OutOfTablesError, match="0x9000000"):
        stage2.map_device(Ipa(0x900_0000), geometry.page, 0)
