"""The audit of the dirty log: every lost write is found at the first harvest after it, and nothing else is."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from tests.hosttree import HostTree, host
from tests.migration.pairs import TCP, hosts

from sterna.host.printable import describe
from sterna.memory.bitmap import DirtyBatch
from sterna.migration.audit import ShadowAudit
from sterna.migration.lostwrites import LostWrite
from sterna.migration.progress import Progress
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.migration.transport.work import SentPages
from sterna.monitor.report import migration_report
from sterna.stream.ram.encoder import Batch
from sterna.testing.guest import WORDS_PER_PAGE, DoubleGuest

__all__ = ["host"]

COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED
PAGES = 7 * 286
"""A multiple of the guest's stride: it writes to every seventh page, and to no other."""


class InjuredGuest(DoubleGuest):
    """A guest to which something is done right after its log was taken, as a vCPU on another thread might.

    :ivar after_harvest: is given the number of the harvest, from 1
    :ivar looks: how often the log was looked at, and was the guest held then
    """

    def __init__(self) -> None:
        super().__init__(PAGES, steps_per_ms=20, steps_per_harvest=100)
        self.after_harvest: Callable[[int], None] = lambda number: None
        self.harvests = 0
        self.looks: list[bool] = []
        self._is_held = False

    def harvest(self) -> list[DirtyBatch]:
        with self._lock:
            batches = super().harvest()
            self.harvests += 1
            self.after_harvest(self.harvests)
            return batches

    @contextmanager
    def held(self) -> Iterator[None]:
        with super().held():
            self._is_held = True
            yield
            self._is_held = False

    def peek_dirty_log(self) -> list[DirtyBatch]:
        self.looks.append(self._is_held)
        return super().peek_dirty_log()

    def write(self, page: int, value: int, *, logged: bool) -> int:
        """Into the page's word 9: what was there."""
        if logged:
            self._log[page >> 6] |= np.uint64(1) << np.uint64(page & 63)
        at = page * WORDS_PER_PAGE + 9
        before, self._words[at] = int(self._words[at]), value
        return before


def quiet_page() -> int:
    """One that the guest never writes."""
    return PAGES - 1


def migrate(
    guest: DoubleGuest, capabilities: dict[str, bool] | None = None, **parameters: Any
) -> MigrationInfo:
    waiting = DoubleGuest(PAGES, running=False)
    with hosts(guest, waiting) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities(capabilities or {})
        settings = {"x-sterna-audit": True, "max-bandwidth": 40_000_000, "downtime-limit": 20}
        here.controller.set_parameters(settings | parameters)
        info = here.migrate(there.controller.incoming(TCP))
        if info.status is COMPLETED:
            waiting.check_ram()
        else:
            assert guest.running
            assert not guest.away
            assert not waiting.running
        return info


@pytest.mark.parametrize(
    "capabilities", [{}, {"xbzrle": True}, {"multifd": True}, {"multifd": True, "xbzrle": True}]
)
def test_a_sound_log_is_found_sound(capabilities: dict[str, bool]) -> None:
    guest = InjuredGuest()
    info = migrate(guest, capabilities)
    assert info.status is COMPLETED, info.error
    assert info.verified
    assert info.audit is not None
    assert info.audit.lost_pages == 0
    # Each harvest was looked at once, the last one too, and the guest was held for it.
    assert info.audit.harvests == guest.harvests >= 2
    assert guest.looks == [True] * guest.harvests
    assert info.audit.pages_judged > 0
    assert 0 < info.audit.longest_hold_ms <= info.audit.held_ms


def test_without_an_audit_nothing_is_looked_at() -> None:
    guest = InjuredGuest()
    info = migrate(guest, **{"x-sterna-audit": False})
    assert info.status is COMPLETED
    assert info.audit is None
    assert guest.looks == []
    assert "audit" not in info.to_qmp()["x-sterna"]


def test_a_lost_write_is_named_though_it_would_heal() -> None:
    guest, page = InjuredGuest(), quiet_page()

    def lose(number: int) -> None:
        if number == 1:
            guest.write(page, 1 << 56, logged=False)
        else:
            guest.write(page, 2, logged=True)  # from here on nobody could tell

    guest.after_harvest = lose
    info = migrate(guest)
    assert info.status is FAILED
    assert guest.harvests == 1
    assert info.audit is not None
    assert info.audit.lost_pages == 1
    [lost] = info.audit.lost
    assert lost == LostWrite(0x4000_0000 + page * 4096, "double.ram", page, 3, 1, 1, 79, 79, lost.positions)
    [position] = lost.positions
    assert position == guest.positions()[0] or position < guest.steps
    assert info.error == f"a write was lost: {lost}"
    assert (
        "page 0x407d1000 (double.ram page 2001, slot 3) differs from what pass 1 sent in bytes 0x4f to 0x4f, "
        "and neither the harvest after pass 1 nor the log since has it; vCPUs at 0x" in info.error
    )
    answer = info.to_qmp()["x-sterna"]["audit"]
    assert answer["lost"][0]["address"] == lost.address
    assert answer["lost"][0]["positions"] == [position]
    assert "audit: 1 harvests, " in migration_report(info.to_qmp())


def test_a_write_that_the_log_has_since_is_none() -> None:
    guest = InjuredGuest()
    guest.after_harvest = lambda number: guest.write(quiet_page(), 0, logged=True) and None
    assert migrate(guest).status is COMPLETED


def test_what_was_taken_back_was_not_lost() -> None:
    """The page is as it was sent again: there is nothing to send, and the digests agree."""
    guest, page = InjuredGuest(), quiet_page()

    def lose(number: int) -> None:
        before = guest.write(page, 5, logged=False)
        guest.write(page, before, logged=False)

    guest.after_harvest = lose
    info = migrate(guest)
    assert info.status is COMPLETED, info.error
    assert info.verified


def test_what_is_sent_is_the_shadow() -> None:
    """A page that is written between its copy and its sending goes as it was copied: what is compared later is what was sent."""
    with DoubleGuest(PAGES, running=False) as guest:
        audit = ShadowAudit(guest, Progress(lambda name, data: None, "x"), SentPages(guest.ram_blocks))
        guest.block.data[3 * 4096] = 5
        staged = audit.stage(Batch(guest.block, np.array([2, 3], dtype=np.int64)))
        guest.block.data[3 * 4096] = 6
        assert (staged.block.name, staged.block.size) == (guest.block.name, guest.block.size)
        assert staged.pages.tolist() == [2, 3]
        assert int(staged.block.data[3 * 4096]) == 5
        audit.close()


def test_the_last_harvest_is_audited() -> None:
    guest, page = InjuredGuest(), quiet_page()

    def lose(number: int) -> None:
        if not guest.running:
            guest.write(page, 5, logged=False)

    guest.after_harvest = lose
    info = migrate(guest)
    assert info.status is FAILED
    assert info.audit is not None
    assert info.audit.harvests == guest.harvests
    assert f"double.ram page {page}" in info.error


def test_many_lost_pages_are_counted_and_some_told() -> None:
    guest = InjuredGuest()

    def lose(number: int) -> None:
        for page in range(PAGES - 100, PAGES):
            guest.write(page, 5, logged=False)

    guest.after_harvest = lose
    info = migrate(guest)
    assert info.audit is not None
    assert info.audit.lost_pages > 16
    assert len(info.audit.lost) == 16
    assert f"a write was lost ({info.audit.lost_pages} such pages): page 0x" in info.error
    assert "\n" not in info.error


def test_a_log_that_cannot_be_looked_at_fails_the_migration() -> None:
    guest = InjuredGuest()

    def refuse() -> list[DirtyBatch]:
        raise RuntimeError("no log to look at")

    guest.peek_dirty_log = refuse  # type: ignore[method-assign]
    info = migrate(guest)
    assert info.status is FAILED
    assert "no log to look at" in info.error


def test_the_text_fits_the_one_line_that_there_is() -> None:
    lost = LostWrite(0xFFFF_F000, "mach-virt.ram", 786431, 0, 1000, 1000, 0, 0xFFF, (0xFFFF_FFFF,) * 4)
    text = f"a write was lost (786431 such pages): {lost}"
    assert describe(RuntimeError(text)).endswith(text)


def left(host: HostTree, size: int) -> None:
    host.unified("/vm")
    host.group("vm", memory__max=1 << 30, memory__current=(1 << 30) - size)


def test_a_second_copy_for_which_there_is_no_memory_is_refused_while_the_guest_runs(host: HostTree) -> None:
    guest = InjuredGuest()
    left(host, guest.block.size - 1)
    info = migrate(guest)
    assert info.status is FAILED
    assert re.fullmatch(
        r"the audit's second copy of guest RAM \(x-sterna-audit\) may take 7\.8 MiB of memory, "
        r"and only \d\.\d MiB are left here, beside all of the guest's own",
        info.error,
    )
    assert not guest.logging_started


def test_the_second_copy_and_a_cache_have_to_fit_in_together(host: HostTree) -> None:
    for spare, status in ((-1, FAILED), (0, COMPLETED)):
        guest = InjuredGuest()
        guest.block.data[:] |= 0  # touched, all of it
        left(host, 2 * guest.block.size + spare)
        info = migrate(guest, {"xbzrle": True}, **{"xbzrle-cache-size": 8 << 20})
        assert info.status is status, info.error
        assert (not guest.logging_started) == (status is FAILED)
        assert status is COMPLETED or re.fullmatch(
            r"the XBZRLE cache \(xbzrle-cache-size\) and the audit's second copy of guest RAM \(x-sterna-audit\) "
            r"together may take 15\.6 MiB of memory, and only 15\.6 MiB are left here, beside all of the guest's own",
            info.error,
        )


def test_what_the_second_copy_may_take_is_not_left_for_the_cache(host: HostTree) -> None:
    guests = [InjuredGuest() for _ in range(2)]
    sizes = []
    for guest, audited in zip(guests, (False, True), strict=True):
        guest.block.data[:] |= 0  # touched, all of it
        left(host, guest.block.size + (5 << 20))
        info = migrate(guest, **{"x-sterna-audit": audited})
        assert info.status is COMPLETED, info.error
        assert info.xbzrle is not None
        sizes.append(info.xbzrle.cache_size)
    assert sizes == [4 << 20, 2 << 20]
