"""Tables that were taken out, which a CPU's walk may still be in: when their pages are used again."""

import pytest
from tests.stage2.support import RAM_PA, access, write

from sterna.memory.address import Ipa
from sterna.stage2 import pool, tables
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import FaultResult
from sterna.stage2.tables import OutOfTablesError
from sterna.stage2.walk import find_leaf
from sterna.testing.flush import RecordingFlush

A = Ipa(0x4000_0000)


def make_blocks(geometry, **arguments):
    """Two blocks, both written to."""
    stage2 = geometry.make(**arguments)
    stage2.insert_slot(0, A, 2 * geometry.block, RAM_PA, readonly=False)
    write(stage2, A)
    write(stage2, A + geometry.block)
    return stage2


@pytest.fixture
def stage2(geometry):
    stage2 = make_blocks(geometry)
    yield stage2
    stage2.validate()


@pytest.fixture
def second_page(geometry):
    return A + geometry.page


@pytest.fixture
def b(geometry):
    """The second block."""
    return Ipa(A + geometry.block)


def log(stage2, flush=None):
    form = stage2.format
    return DirtyLog(stage2, flush or RecordingFlush(), 0, A, 2 * form.entries(3))


def leaf_at(stage2, ipa):
    return find_leaf(stage2.state, stage2.tables, ipa)[0]


def found_there(stage2, at):
    """What a walk finds that has read the entry which points to this leaf's table before: a physical address, or None."""
    entry = int(stage2.tables[at])
    return entry & stage2.format.address if entry & stage2.format.present else None


def test_a_walk_through_an_unmapped_table_finds_nothing_of_another_s(geometry, stage2, second_page, b):
    log(stage2)
    write(stage2, second_page)
    at = leaf_at(stage2, second_page)
    stage2.unmap(A, geometry.block)
    write(stage2, b + geometry.page)
    assert found_there(stage2, at) is None
    seen = []
    stage2.flush_tlbs(RecordingFlush(lambda: seen.append(found_there(stage2, at))))
    assert seen == [None]


def test_a_walk_through_a_rebuilt_block_s_table_finds_its_pages_while_logging_starts(
    geometry, stage2, second_page, b
):
    first = log(stage2)
    write(stage2, second_page)
    at = leaf_at(stage2, second_page)
    first.get()
    first.disable()
    write(stage2, A)
    assert stage2.statistics()["blocks_rebuilt"] == 1
    seen = []

    def other_cpu():
        write(stage2, b + geometry.page)
        seen.append(found_there(stage2, at))

    log(stage2, RecordingFlush(other_cpu))
    assert seen == [RAM_PA + geometry.page]


def test_a_table_of_tables_is_not_used_for_pages_at_once(geometry):
    """The walker would take the descriptors of pages for pointers to tables, and guest memory for descriptors."""
    stage2 = make_blocks(geometry)
    other = Ipa(A + geometry.large)
    stage2.insert_slot(1, other, geometry.page, RAM_PA + geometry.large, readonly=False)
    taken_out = geometry.tables_in_use(stage2).keys()
    assert len(taken_out) == 1 + geometry.upper
    stage2.unmap(A, 2 * geometry.block)
    write(stage2, other)
    assert not taken_out & geometry.tables_in_use(stage2).keys()


def test_a_page_is_used_again_after_the_flush(geometry, stage2, b):
    log(stage2)
    write(stage2, A)
    before = geometry.tables_in_use(stage2).keys()
    stage2.unmap(A, geometry.block)
    free = stage2.free_tables
    stage2.flush_tlbs(RecordingFlush())
    assert stage2.free_tables == free
    write(stage2, b)
    assert geometry.tables_in_use(stage2).keys() == before


def use_a_table(stage2, number):
    """A slot of one page takes a table, if there is one, and gives it back."""
    form = stage2.format
    ipa = Ipa(A + ((8 + number) << form.shift(2)))
    stage2.insert_slot(number, ipa, form.page_size, RAM_PA + (1 << 30), readonly=False)
    outcome = access(stage2, ipa, write=True)
    stage2.remove_slot(number)
    return outcome


@pytest.fixture
def small(geometry):
    """Beside the root and the blocks' table there are two pages in the pool."""
    stage2 = make_blocks(geometry, pool_size=geometry.pool(geometry.upper + 3))
    yield stage2
    stage2.validate()


def test_a_flush_is_for_what_was_taken_out_before_it_began(small):
    small.flush_tlbs(RecordingFlush(lambda: use_a_table(small, 1)))
    assert use_a_table(small, 2) is FaultResult.RESUME
    assert use_a_table(small, 3) is FaultResult.NO_MEMORY
    small.flush_tlbs(RecordingFlush())
    assert use_a_table(small, 4) is FaultResult.RESUME
    assert use_a_table(small, 5) is FaultResult.RESUME


def test_a_flush_that_fails_frees_nothing_and_loses_nothing(small):
    def fail():
        raise InterruptedError

    use_a_table(small, 1)
    with pytest.raises(InterruptedError):
        small.flush_tlbs(RecordingFlush(fail))
    assert use_a_table(small, 2) is FaultResult.RESUME
    assert use_a_table(small, 3) is FaultResult.NO_MEMORY
    small.validate()
    small.flush_tlbs(RecordingFlush())
    assert use_a_table(small, 4) is FaultResult.RESUME
    assert use_a_table(small, 5) is FaultResult.RESUME


def test_without_a_free_page_a_flush_gives_those_taken_out(geometry, small):
    flush = RecordingFlush()
    device = Ipa(A + geometry.large)
    use_a_table(small, 1)
    use_a_table(small, 2)
    assert small.free_tables == 2
    with pytest.raises(OutOfTablesError):
        small.map_device(device, geometry.page, 0)
    assert small.reclaim(flush)
    assert flush.counters.flushes == 1
    assert small.reclaim(flush)
    assert flush.counters.flushes == 1, "there are free pages"
    small.map_device(device, geometry.page, 0)
    assert small.free_tables == 0
    assert not small.reclaim(flush)
    assert flush.counters.flushes == 1, "there is nothing to be had by one"


def test_others_may_be_faster_and_their_pages_come_next(small, monkeypatch):
    def end_flush(*arguments):
        pool.end_flush(*arguments)
        assert use_a_table(small, 3) is FaultResult.RESUME
        assert use_a_table(small, 4) is FaultResult.RESUME

    use_a_table(small, 1)
    use_a_table(small, 2)
    monkeypatch.setattr(tables, "end_flush", end_flush)
    assert small.reclaim(RecordingFlush())
    assert use_a_table(small, 5) is FaultResult.NO_MEMORY
    monkeypatch.undo()
    assert small.reclaim(RecordingFlush())
    assert use_a_table(small, 6) is FaultResult.RESUME
