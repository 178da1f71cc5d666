"""The dirty log: get, clear, enable, disable, and the flush that belongs to each."""

import numpy as np
import pytest
from tests.stage2.support import RAM_PA, read, write

from sterna.memory.address import Ipa
from sterna.memory.bitmap import full_bitmap, new_bitmap, page_numbers
from sterna.stage2.dirtylog import DirtyLog, DirtyLogError
from sterna.testing.flush import RecordingFlush

RAM = Ipa(0x4000_0000)
PAGES = 1024 + 3  # not a multiple of 64


@pytest.fixture
def stage2(geometry):
    stage2 = geometry.make()
    stage2.insert_slot(0, RAM, PAGES * geometry.page, RAM_PA, readonly=False)
    yield stage2
    stage2.validate()


@pytest.fixture
def flush():
    return RecordingFlush()


@pytest.fixture
def log(stage2, flush):
    return DirtyLog(stage2, flush, 0, RAM, PAGES)


def page(stage2, number):
    return Ipa(RAM + number * stage2.format.page_size)


def writable(stage2, number):
    return bool(stage2.entry(page(stage2, number))[0] & stage2.format.write)


def bits(*numbers, pages=PAGES):
    words = new_bitmap(pages)
    for number in numbers:
        words[number // 64] |= np.uint64(1 << number % 64)
    return words


def test_each_write_is_logged_once(stage2, log):
    for number in (0, 63, 64, 700, PAGES - 1):
        write(stage2, page(stage2, number))
    assert list(page_numbers(log.get())) == [0, 63, 64, 700, PAGES - 1]
    assert not log.get().any()


def test_get_protects_again(stage2, log):
    write(stage2, page(stage2, 5))
    log.get()
    assert not writable(stage2, 5)
    write(stage2, page(stage2, 5))
    assert list(page_numbers(log.get())) == [5]


def test_get_protects_the_mask_s_range(stage2, log):
    """From the first to the last dirty page of a word, the last included; pages of other words stay writable."""
    for number in (2, 9, 130):
        write(stage2, page(stage2, number))
    log.get()
    assert not any(writable(stage2, number) for number in range(PAGES))


def test_53eac7a8_last_page_of_a_partial_word(stage2, log):
    write(stage2, page(stage2, PAGES - 1))
    assert list(page_numbers(log.get())) == [PAGES - 1]
    assert not writable(stage2, PAGES - 1)


def test_flush_comes_after_protection_and_before_get_returns(stage2):
    seen = []
    flush = RecordingFlush()
    log = DirtyLog(stage2, flush, 0, RAM, PAGES)
    write(stage2, page(stage2, 3))
    flush.on_flush = lambda: seen.append(writable(stage2, 3))
    log.get()
    assert seen == [False]


def test_get_of_a_clean_log_flushes_nothing(stage2, flush, log):
    flushes = flush.counters.flushes
    log.get()
    assert flush.counters.flushes == flushes


def test_edde99ce_enable_protects_after_the_bitmap_is_in_place(stage2):
    """Linux edde99ce0529: once a page is protected, a write to it is logged."""
    write(stage2, page(stage2, 1))
    faulted = []

    class Log(DirtyLog):
        pass

    flush = RecordingFlush(lambda: faulted.append((writable(stage2, 1), write(stage2, page(stage2, 1)))))
    log = Log(stage2, flush, 0, RAM, PAGES)
    assert faulted == [(False, None)]  # protected when flushed, and the write that came then ...
    assert list(page_numbers(log.get())) == [1]  # ... is in the log


def test_6dbf79e7_enable_flushes_even_if_nothing_was_writable(stage2, flush):
    read(stage2, page(stage2, 0))
    stage2.protect(RAM, PAGES * stage2.format.page_size)
    DirtyLog(stage2, flush, 0, RAM, PAGES)
    assert flush.counters.flushes == 1


def test_a_harvest_is_owned(stage2, log):
    write(stage2, page(stage2, 3))
    batch = log.get()
    write(stage2, page(stage2, 4))
    assert list(page_numbers(batch)) == [3]


def test_86658b81_no_storm_when_another_cpu_was_first(stage2, log):
    """Linux 86658b819cd0: an entry that is already as wanted is left alone."""
    write(stage2, page(stage2, 3))
    before = stage2.statistics()
    stage2.fault(page(stage2, 3))
    after = stage2.statistics()
    assert after["faults_spurious"] == before["faults_spurious"] + 1
    assert after["faults_permission"] == before["faults_permission"]


def test_read_that_races_with_another_cpu_s_population_is_no_write(geometry):
    """Both CPUs found the page absent; the second to be served finds a read-only leaf, as a write would."""
    stage2 = geometry.make(cpus=2)
    stage2.insert_slot(0, RAM, PAGES * geometry.page, RAM_PA, readonly=False)
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, PAGES)
    stage2.fault(page(stage2, 0), cpu=0)
    stage2.fault(page(stage2, 0), cpu=1)
    assert not log.get().any()
    stage2.fault(page(stage2, 0), cpu=1)  # it came again: a write
    assert list(page_numbers(log.get())) == [0]


def test_c126d94f_only_the_page_written_becomes_writable(stage2):
    """Linux c126d94f2c90: a large entry must not become writable for one page's write."""
    write(stage2, page(stage2, 0))
    write(stage2, page(stage2, 100))
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, PAGES)
    write(stage2, page(stage2, 100))
    assert [n for n in range(PAGES) if writable(stage2, n)] == [100]
    assert list(page_numbers(log.get())) == [100]


def test_host_writes_are_logged(log):
    log.mark(60, 10)
    assert list(page_numbers(log.get())) == list(range(60, 70))
    log.mark(0, PAGES)
    assert list(page_numbers(log.get())) == list(range(PAGES))
    for first, count in ((PAGES, 1), (-1, 1), (0, PAGES + 1), (0, -1)):
        with pytest.raises(DirtyLogError):
            log.mark(first, count)


def test_manual_get_changes_nothing(stage2, flush):
    log = DirtyLog(stage2, flush, 0, RAM, PAGES, manual_protect=True)
    write(stage2, page(stage2, 9))
    flushes = flush.counters.flushes
    assert list(page_numbers(log.get())) == [9]
    assert list(page_numbers(log.get())) == [9]
    assert writable(stage2, 9)
    assert flush.counters.flushes == flushes


def test_clear_protects_only_what_it_clears(stage2, flush):
    log = DirtyLog(stage2, flush, 0, RAM, PAGES, manual_protect=True)
    for number in (1, 3, 64, 70):
        write(stage2, page(stage2, number))
    flushes = flush.counters.flushes
    log.clear(0, 64, bits(1, 2))
    assert flush.counters.flushes == flushes + 1
    assert [writable(stage2, n) for n in (1, 3, 64, 70)] == [False, True, True, True]
    assert list(page_numbers(log.get())) == [3, 64, 70]
    log.clear(64, PAGES - 64, bits(0, 6))  # bit 0 is page 64
    assert list(page_numbers(log.get())) == [3]
    log.clear(0, 64, bits(2))  # not dirty: nothing to flush
    assert flush.counters.flushes == flushes + 2


@pytest.mark.parametrize(
    ("first", "count"), [(1, 64), (0, 63), (0, 0), (64, PAGES), (-64, 64), (1024, 4), (0, 1 << 62)]
)
def test_clear_refuses_ranges(stage2, first, count):
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, PAGES, manual_protect=True)
    with pytest.raises(DirtyLogError):
        log.clear(first, count, full_bitmap(PAGES))


def test_clear_reaches_the_slot_s_end(stage2):
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, PAGES, manual_protect=True)
    write(stage2, page(stage2, PAGES - 1))
    log.clear(1024, 3, np.full(1, np.iinfo(np.uint64).max, dtype=np.uint64))
    assert not log.get().any()


def test_clear_refuses_a_short_bitmap(stage2):
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, PAGES, manual_protect=True)
    with pytest.raises(DirtyLogError, match="does not cover"):
        log.clear(0, 128, new_bitmap(64))


def test_clear_needs_manual_protect(log):
    with pytest.raises(DirtyLogError, match="manual"):
        log.clear(0, 64, new_bitmap(64))


def test_initially_set_protects_nothing_until_cleared(stage2):
    write(stage2, page(stage2, 0))
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, PAGES, manual_protect=True, initially_set=True)
    assert writable(stage2, 0)
    assert list(page_numbers(log.get())) == list(range(PAGES))
    log.clear(0, PAGES, full_bitmap(PAGES))
    assert not writable(stage2, 0)
    assert not log.get().any()
    write(stage2, page(stage2, 600))
    assert list(page_numbers(log.get())) == [600]


def test_disable_walks_nothing(stage2, log):
    write(stage2, page(stage2, 3))
    before = stage2.statistics()
    log.disable()
    assert stage2.statistics() == before
    write(stage2, page(stage2, 4))
    assert stage2.statistics()["dirty_marked"] == before["dirty_marked"]


def test_two_slots_have_their_own_logs(geometry, stage2, log):
    other = page(stage2, 2048)
    stage2.insert_slot(1, other, 64 * geometry.page, RAM_PA + 2048 * geometry.page, readonly=False)
    second = DirtyLog(stage2, RecordingFlush(), 1, other, 64)
    write(stage2, page(stage2, 1))
    write(stage2, other + 2 * geometry.page)
    assert list(page_numbers(log.get())) == [1]
    assert list(page_numbers(second.get())) == [2]


def test_read_that_meets_a_broken_block_is_no_write(geometry):
    """Between break and make another CPU finds the block gone, and comes to fault handling after the new table is there."""
    stage2 = geometry.make(cpus=2)
    stage2.insert_slot(0, RAM, geometry.block, RAM_PA, readonly=False)
    stage2.fault(page(stage2, 0), cpu=0)
    stage2.fault(page(stage2, 0), cpu=1)
    log = DirtyLog(stage2, RecordingFlush(), 0, RAM, geometry.pages)
    stage2.fault(page(stage2, 3), cpu=0)  # dissolves
    stage2.fault(page(stage2, 5), cpu=1)
    assert list(page_numbers(log.get())) == [3]
