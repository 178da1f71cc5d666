"""What every dirty log does, whoever keeps it and however."""

import struct

import numpy as np
import pytest

from sterna.hypervisor.interface import DirtyLogMode, ManualProtect
from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import page_numbers
from sterna.testing.conformance.backends import CELL, Program
from sterna.testing.conformance.guest import (
    LOG,
    WORK,
    WORK_PAGES,
    ConformanceGuest,
    MakeGuest,
    Variant,
    wait_until,
)

ROUNDS = 8
WRITES_PER_ROUND = 300


def test_exactly_the_pages_written(guest: ConformanceGuest) -> None:
    guest.log()
    pages = [0, 1, 63, 64, 65, 511, 512, 1000, WORK_PAGES - 3, WORK_PAGES - 2, WORK_PAGES - 1]
    guest.store(pages)
    assert guest.harvest() == pages
    assert guest.harvest() == []


def test_reads_are_not_logged(guest: ConformanceGuest) -> None:
    guest.log()
    guest.load(range(0, WORK_PAGES, 7))
    assert guest.harvest() == []


def test_without_a_log_nothing_is_logged(guest: ConformanceGuest) -> None:
    guest.touch(0, 100)
    guest.log()
    assert guest.harvest() == []
    guest.touch(0, 10)
    guest.log(False)
    guest.touch(0, 50)
    guest.log()
    assert guest.harvest() == []


def oracle_round(guest: ConformanceGuest, iteration: int) -> None:
    """One iteration of the kernel's dirty_log_test with its oracle of 2025: a harvest while the guest runs, one when it
    stands, and together they are all that was written.
    """
    guest.write(CELL, struct.pack("<I", iteration))
    for cpu in range(len(guest.cpus)):
        guest.resume(cpu)
    wait_until(lambda: np.count_nonzero(guest.words == iteration) > WRITES_PER_ROUND, "writes")
    dirty = set(guest.harvest())
    guest.stop()
    dirty |= set(guest.harvest())
    values = guest.words.copy()
    written = set(np.flatnonzero(values == iteration).tolist())
    assert np.all(values <= iteration)
    assert written <= dirty, f"written and not logged: {sorted(written - dirty)[:10]}"
    # For each CPU, a store whose value was loaded before the guest stopped is done after, and one that was let through is not
    # done yet.
    late = dirty - written
    assert len(late) <= 2 * len(guest.cpus), f"logged and not written: {sorted(late)[:10]}"


def oracle_rounds(guest: ConformanceGuest) -> None:
    guest.write(CELL, struct.pack("<I", 0))
    for cpu in range(len(guest.cpus)):
        guest.start(Program.SCATTER, WORK, guest.pages, CELL, 7 + cpu, cpu=cpu)
    guest.stop()
    guest.log()
    for iteration in range(1, ROUNDS):
        oracle_round(guest, iteration)


def test_oracle(guest: ConformanceGuest) -> None:
    oracle_rounds(guest)


def test_oracle_with_two_cpus(make_guest: MakeGuest) -> None:
    oracle_rounds(make_guest(smp=2))


def test_oracle_on_memory_that_cannot_be_in_blocks(make_guest: MakeGuest) -> None:
    """The slot's place in the host is not that in the guest, modulo 2 MiB."""
    oracle_rounds(make_guest(offset=PAGE_SIZE))


def test_a_copy_made_from_the_harvests_is_the_memory(make_guest: MakeGuest) -> None:
    """As a migration sends it: each batch's pages are read after the harvest has returned, while the guest goes on."""
    guest = make_guest(smp=2)
    guest.log()
    copy = guest.ram.copy()
    for cpu in (0, 1):
        guest.start(Program.SWEEP, WORK, 700, cpu << 20, cpu=cpu)
    for _ in range(10):
        guest.wait_change(0)
        dirty = guest.harvest()
        copy[dirty] = guest.ram[dirty]
    guest.stop()
    dirty = guest.harvest()
    copy[dirty] = guest.ram[dirty]
    assert np.array_equal(copy, guest.ram)


def test_blocks_are_split_while_logging_and_come_back(guest: ConformanceGuest) -> None:
    """As dirty_log_page_splitting_test has it."""
    guest.touch(0, WORK_PAGES)
    if "blocks_2m" not in guest.vm.statistics():
        pytest.skip("this architecture's KVM does not count its pages by size")
    before = guest.vm.statistics()["blocks_2m"]
    assert before >= 8
    guest.log()
    guest.touch(0, WORK_PAGES, value=2)
    during = guest.vm.statistics()
    assert during["blocks_2m"] <= before - 8
    assert during["pages_4k"] >= WORK_PAGES
    guest.log(False)
    guest.touch(0, WORK_PAGES, value=3)
    assert guest.vm.statistics()["blocks_2m"] == before
    assert np.all(guest.words == 3)


def test_host_writes_are_logged_only_while_logging(guest: ConformanceGuest) -> None:
    guest.vm.mark_dirty(1, 3, 2)
    guest.log()
    assert guest.harvest() == []
    guest.vm.mark_dirty(1, 62, 5)
    guest.store([64, 100])
    assert guest.harvest() == [62, 63, 64, 65, 66, 100]
    assert guest.harvest() == []


def test_switching_a_live_log(make_guest: MakeGuest) -> None:
    guest = make_guest()
    guest.start(Program.SWEEP, WORK, 500, 0)
    for _ in range(5):
        guest.log()
        guest.wait_change(499)
        assert set(guest.harvest()) <= set(range(500))
        guest.log(False)
    guest.log()
    snapshot = guest.words.copy()
    before = int(guest.words[0])
    wait_until(lambda: int(guest.words[0]) - before > 3 * 500, "sweeps")
    guest.stop()
    changed = np.flatnonzero(guest.words != snapshot)
    assert set(changed.tolist()) <= set(guest.harvest())


def test_a_log_that_was_on_twice(guest: ConformanceGuest) -> None:
    """Setting flags that are set is no news."""
    guest.log()
    guest.store([5])
    guest.set_slot(flags=LOG)
    assert guest.harvest() == [5]


def test_manual_protect_comes_and_goes_with_a_log_on(make_guest: MakeGuest, variant: Variant) -> None:
    if variant[1] is DirtyLogMode.RING:
        return
    guest = make_guest()
    guest.log()
    for page, flags in ((5, ManualProtect.ENABLE), (6, ManualProtect.OFF), (7, ManualProtect.ENABLE)):
        guest.store([page])
        guest.vm.enable_manual_protect(flags)
        assert guest.harvest() == [page]
        assert guest.harvest() == []


def test_get_and_clear(make_guest: MakeGuest, variant: Variant) -> None:
    """KVM_GET_DIRTY_LOG, and KVM_CLEAR_DIRTY_LOG where protection is manual, by themselves."""
    if variant[1] is DirtyLogMode.RING:
        return  # a VM with rings has no such calls
    guest = make_guest()
    guest.log()
    guest.store([1, 70, WORK_PAGES - 1])
    first = guest.vm.get_dirty_log(1)
    assert page_numbers(first).tolist() == [1, 70, WORK_PAGES - 1]
    second = guest.vm.get_dirty_log(1)
    if variant[1] is DirtyLogMode.BITMAP:
        assert not second.any()
        return
    assert np.array_equal(first, second)
    tail = (WORK_PAGES - 1) // 64 * 64
    guest.vm.clear_dirty_log(1, tail, WORK_PAGES - tail, first[tail // 64 :])
    assert guest.harvest() == [1, 70]
    guest.store([WORK_PAGES - 1])
    assert guest.harvest() == [WORK_PAGES - 1]
