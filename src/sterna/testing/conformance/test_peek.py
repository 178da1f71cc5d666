"""A peek at a dirty log, which leaves it as it is, whoever keeps it and however."""

import numpy as np
import pytest

from sterna.hypervisor.interface import DirtyLogMode, HypervisorError
from sterna.memory.bitmap import page_numbers
from sterna.testing.conformance.backends import Program
from sterna.testing.conformance.guest import (
    LOG,
    WORK,
    WORK_PAGES,
    ConformanceGuest,
    MakeGuest,
    Variant,
)

PAGES = [0, 1, 63, 64, 65, 511, 512, 1000, WORK_PAGES - 2, WORK_PAGES - 1]


def peek(guest: ConformanceGuest) -> list[int]:
    return [int(page) for page in page_numbers(guest.vm.peek_dirty_log(guest.slot.slot))]


def test_what_a_peek_shows_the_harvest_has(guest: ConformanceGuest) -> None:
    guest.log()
    assert peek(guest) == []
    guest.store(PAGES)
    for _ in range(3):
        assert peek(guest) == PAGES
    assert guest.harvest() == PAGES
    assert peek(guest) == []
    assert guest.harvest() == []


def test_what_is_written_after_a_peek_is_logged(guest: ConformanceGuest) -> None:
    guest.log()
    guest.store(PAGES[:4])
    assert peek(guest) == PAGES[:4]
    guest.store(PAGES[2:8], value=2)
    assert peek(guest) == PAGES[:8]
    assert guest.harvest() == PAGES[:8]
    guest.store(PAGES[:2], value=3)
    assert guest.harvest() == PAGES[:2]


def test_a_peek_is_the_callers_own(guest: ConformanceGuest) -> None:
    guest.log()
    guest.store([5])
    words = guest.vm.peek_dirty_log(guest.slot.slot)
    words[:] = 0
    assert guest.harvest() == [5]


def test_a_peek_has_what_the_host_wrote(guest: ConformanceGuest) -> None:
    guest.log()
    guest.vm.mark_dirty(guest.slot.slot, 70, 3)
    guest.store([7])
    assert peek(guest) == [7, 70, 71, 72]
    guest.vm.mark_dirty(guest.slot.slot, 80, 1)
    assert guest.harvest() == [7, 70, 71, 72, 80]
    assert guest.harvest() == []


def test_a_log_that_ends_takes_what_was_peeked_along(guest: ConformanceGuest) -> None:
    guest.log()
    guest.store([5])
    assert peek(guest) == [5]
    guest.log(False)
    guest.log()
    assert peek(guest) == []
    assert guest.harvest() == []


def test_clear_clears_what_a_peek_showed(make_guest: MakeGuest, variant: Variant) -> None:
    if variant[1] is not DirtyLogMode.MANUAL:
        return
    guest = make_guest()
    guest.log()
    guest.store([3, 70])
    words = guest.vm.peek_dirty_log(guest.slot.slot)
    words[1] = 0
    guest.vm.clear_dirty_log(guest.slot.slot, 0, guest.pages, words)
    assert peek(guest) == [70]


def test_a_peek_without_a_log_is_refused(guest: ConformanceGuest) -> None:
    with pytest.raises(HypervisorError, match=f"memory slot {guest.slot.slot}|KVM_GET_DIRTY_LOG"):
        guest.vm.peek_dirty_log(guest.slot.slot)
    with pytest.raises(HypervisorError):
        guest.vm.peek_dirty_log(99)
    assert not guest.slot.flags & LOG


def test_no_write_is_lost_between_peeks_and_harvests(make_guest: MakeGuest) -> None:
    """The auditor's own sequence, many times: harvest, stop, peek, go on. What changed since the harvest is in one of the two."""
    guest = make_guest()
    guest.log()
    guest.start(Program.SWEEP, WORK, 700, 0)
    shadow = guest.words.copy()
    for _ in range(20):
        guest.wait_change(699)
        harvest = guest.harvest()
        guest.stop()
        changed = np.flatnonzero(guest.words != shadow).tolist()
        assert set(changed) <= set(harvest) | set(peek(guest))
        # What is not harvested stays as it was sent: a peek that lost it would show at the next one.
        shadow[harvest] = guest.words[harvest]
        guest.resume()
    guest.stop()
