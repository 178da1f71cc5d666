"""Tables that were taken out, which a CPU's walk may still be in: when their pages are used again."""

import pytest
from tests.stage2.support import RAM_PA, access, make, tables_in_use, write

from sterna.memory.address import PAGE_SIZE, PMD_SIZE, PUD_SIZE, Ipa
from sterna.stage2 import armv7, pool, tables
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.fault import Outcome
from sterna.stage2.tables import OutOfTablesError
from sterna.stage2.walk import find_leaf
from sterna.testing.flush import RecordingFlush

A = Ipa(0x4000_0000)
B = Ipa(A + PMD_SIZE)


def make_blocks(**arguments):
    """Two blocks, both written to."""
    stage2 = make(**arguments)
    stage2.insert_slot(0, A, 2 * PMD_SIZE, RAM_PA, readonly=False)
    write(stage2, A)
    write(stage2, B)
    return stage2


@pytest.fixture
def stage2():
    stage2 = make_blocks()
    yield stage2
    stage2.validate()


def log(stage2, flush=None):
    return DirtyLog(stage2, flush or RecordingFlush(), 0, A, 1024)


def leaf_at(stage2, ipa):
    return find_leaf(stage2.state, stage2.tables, ipa)[0]


def found_there(stage2, at):
    """What a walk finds that has read the entry which points to this leaf's table before: a physical address, or None."""
    entry = int(stage2.tables[at])
    return entry & armv7.FORMAT.address if entry & armv7.FORMAT.present else None


def test_a_walk_through_an_unmapped_table_finds_nothing_of_another_s(stage2):
    log(stage2)
    write(stage2, A + PAGE_SIZE)
    at = leaf_at(stage2, A + PAGE_SIZE)
    stage2.unmap(A, PMD_SIZE)
    write(stage2, B + PAGE_SIZE)
    assert found_there(stage2, at) is None
    seen = []
    stage2.flush_tlbs(RecordingFlush(lambda: seen.append(found_there(stage2, at))))
    assert seen == [None]


def test_a_walk_through_a_rebuilt_block_s_table_finds_its_pages_while_logging_starts(stage2):
    first = log(stage2)
    write(stage2, A + PAGE_SIZE)
    at = leaf_at(stage2, A + PAGE_SIZE)
    first.get()
    first.disable()
    write(stage2, A)
    assert stage2.statistics()["blocks_rebuilt"] == 1
    seen = []

    def other_cpu():
        write(stage2, B + PAGE_SIZE)
        seen.append(found_there(stage2, at))

    log(stage2, RecordingFlush(other_cpu))
    assert seen == [RAM_PA + PAGE_SIZE]


def test_a_table_of_tables_is_not_used_for_pages_at_once():
    """The walker would take the descriptors of pages for pointers to tables, and guest memory for descriptors."""
    stage2 = make_blocks()
    other = Ipa(A + PUD_SIZE)
    stage2.insert_slot(1, other, PAGE_SIZE, RAM_PA + PUD_SIZE, readonly=False)
    stage2.unmap(A, 2 * PMD_SIZE)
    taken_out = {2 * 512}
    write(stage2, other)
    assert not taken_out & tables_in_use(stage2).keys()


def test_a_page_is_used_again_after_the_flush(stage2):
    log(stage2)
    write(stage2, A)
    before = tables_in_use(stage2).keys()
    stage2.unmap(A, PMD_SIZE)
    free = stage2.free_tables
    stage2.flush_tlbs(RecordingFlush())
    assert stage2.free_tables == free
    write(stage2, B)
    assert tables_in_use(stage2).keys() == before


def use_a_table(stage2, number):
    """A slot of one page takes a table, if there is one, and gives it back."""
    ipa = Ipa(A + (8 + number) * PMD_SIZE)
    stage2.insert_slot(number, ipa, PAGE_SIZE, RAM_PA + PUD_SIZE + number * PAGE_SIZE, readonly=False)
    outcome = access(stage2, ipa, write=True)
    stage2.remove_slot(number)
    return outcome


@pytest.fixture
def small():
    """Beside the root and the blocks' table there are two pages in the pool."""
    stage2 = make_blocks(pool_size=5 * PAGE_SIZE)
    yield stage2
    stage2.validate()


def test_a_flush_is_for_what_was_taken_out_before_it_began(small):
    small.flush_tlbs(RecordingFlush(lambda: use_a_table(small, 1)))
    assert use_a_table(small, 2) is Outcome.RESUME
    assert use_a_table(small, 3) is Outcome.NO_MEMORY
    small.flush_tlbs(RecordingFlush())
    assert use_a_table(small, 4) is Outcome.RESUME
    assert use_a_table(small, 5) is Outcome.RESUME


def test_a_flush_that_fails_frees_nothing_and_loses_nothing(small):
    def fail():
        raise InterruptedError

    use_a_table(small, 1)
    with pytest.raises(InterruptedError):
        small.flush_tlbs(RecordingFlush(fail))
    assert use_a_table(small, 2) is Outcome.RESUME
    assert use_a_table(small, 3) is Outcome.NO_MEMORY
    small.validate()
    small.flush_tlbs(RecordingFlush())
    assert use_a_table(small, 4) is Outcome.RESUME
    assert use_a_table(small, 5) is Outcome.RESUME


def test_without_a_free_page_a_flush_gives_those_taken_out(small):
    flush = RecordingFlush()
    use_a_table(small, 1)
    use_a_table(small, 2)
    assert small.free_tables == 2
    with pytest.raises(OutOfTablesError):
        small.map_device(Ipa(0x900_0000), PAGE_SIZE, 0)
    assert small.reclaim(flush)
    assert flush.counters.flushes == 1
    assert small.reclaim(flush)
    assert flush.counters.flushes == 1, "there are free pages"
    small.map_device(Ipa(0x900_0000), PAGE_SIZE, 0)
    assert small.free_tables == 0
    assert not small.reclaim(flush)
    assert flush.counters.flushes == 1, "there is nothing to be had by one"


def test_others_may_be_faster_and_their_pages_come_next(small, monkeypatch):
    def end_flush(*arguments):
        pool.end_flush(*arguments)
        assert use_a_table(small, 3) is Outcome.RESUME
        assert use_a_table(small, 4) is Outcome.RESUME

    use_a_table(small, 1)
    use_a_table(small, 2)
    monkeypatch.setattr(tables, "end_flush", end_flush)
    assert small.reclaim(RecordingFlush())
    assert use_a_table(small, 5) is Outcome.NO_MEMORY
    monkeypatch.undo()
    assert small.reclaim(RecordingFlush())
    assert use_a_table(small, 6) is Outcome.RESUME
