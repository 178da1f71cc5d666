"""Migrations are cancelled, each further on than the one before."""

import time
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

from sterna.guests.layout import PAGE_BYTES
from sterna.launch.errors import LaunchError, VmError
from sterna.launch.guestview import pages_in_use
from sterna.launch.process import Vm
from sterna.launch.watch import FINAL
from sterna.testbed.bed import Bed, Stage
from sterna.testbed.errors import BedError
from sterna.testbed.evidence import Cancelled, Evidence, HugePages, Moment
from sterna.testbed.guest import Guest
from sterna.testbed.migration import Migration
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.settings import MigrationSettings, Positive

_REACH_SECONDS = 60.0
_REBUILD_SECONDS = 3.0
"""Within this time a guest at work writes all its pages, also on a host that keeps it from its processors for a second."""
_LOOK_SECONDS = 0.05
_WINDOWS = 5
_MOST_WINDOWS = 40


class Cancel(BaseProcedure, tag="cancel", frozen=True):
    """Cancel at each point; then migrate to the end.

    :ivar points: how much is sent before the cancel, as a part of the RAM that the guest uses; beyond 1 in later passes
    :ivar window_s: how long the guest's speed is measured at a time
    :ivar finish: how the last migration is done
    """

    points: Annotated[list[Positive], msgspec.Meta(min_length=1)]
    window_s: Positive = 0.2
    finish: MigrationSettings = MigrationSettings()

    def run(self, stage: Stage, evidence: Evidence) -> None:
        bed = stage.bed
        guest = stage.guest
        source = bed.source(stage.vm)
        destination = bed.destination(stage.vm)
        bed.warm_up(source, guest)
        destination.ready()
        used = pages_in_use(guest.mark(source)) * PAGE_BYTES
        counter = _Counter(bed, source, evidence)
        evidence.blocks_before = counter.look()
        # Once unmeasured: a CPU emulator's TLB is larger after it.
        for number, point in enumerate((self.points[0], *self.points)):
            if number == 1:
                evidence.speeds.append(speed(guest, source, self.window_s))
            migration = Migration(stage, source, destination, endless=True, watch=counter.watch)
            bed.say(f"cancel when {point:g} of RAM is sent")
            counter.begin()
            migration.start()
            _wait_for_point(bed, migration, point * used)
            transferred = migration.passage.moments[-1].transferred
            at = bed.now()
            status, ms = migration.cancel()
            runs = _runs_on(bed, guest, source)
            after = counter.rebuilt(evidence.blocks_before)
            if number:
                cancelled = Cancelled(at, point, transferred, status, ms, runs, counter.least, after)
                evidence.cancelled.append(cancelled)
            if not bed.kind.waits_again:
                destination.close()
                destination = bed.destination(stage.vm)
                destination.ready()
        evidence.speeds.append(speed(guest, source, self.window_s, evidence.speeds[0]))
        last = replace(stage, migration=self.finish)
        migration = Migration(last, source, destination, watch=counter.watch)
        evidence.passages.append(migration.passage)
        bed.say("migrate to the end")
        migration.run()
        migration.arrive()


@dataclass
class _Counter:
    """Counts a VM's huge pages over time, where it tells them.

    :ivar least: fewest since `begin`
    """

    bed: Bed
    vm: Vm
    evidence: Evidence
    least: int | None = None

    def begin(self) -> None:
        self.least = None
        self.look()

    def watch(self, moment: Moment) -> None:
        """With each look at a migration."""
        self.look()

    def look(self) -> int | None:
        """How many there are now."""
        found = huge_pages(self.vm)
        if found is None:
            return None
        blocks, pages = found
        self.evidence.huge_pages.append(HugePages(self.bed.now(), blocks, pages))
        self.least = blocks if self.least is None else min(self.least, blocks)
        return blocks

    def rebuilt(self, wanted: int | None) -> int | None:
        """How many there are when they are all back, or no more come."""
        least, blocks = self.least, self.look()
        changed = time.monotonic()
        while blocks is not None and wanted is not None and blocks < wanted:
            time.sleep(_LOOK_SECONDS)
            now = self.look()
            if now != blocks:
                changed = time.monotonic()
            elif time.monotonic() - changed > _REBUILD_SECONDS:
                break
            blocks = now
        self.least = least
        return blocks


def huge_pages(vm: Vm) -> tuple[int, int] | None:
    """Mappings of 2 MiB and of 4 KiB in stage 2; None when the VM does not tell."""
    try:
        counts = vm.command("x-sterna-query-stage2")
    except VmError:
        return None
    if "blocks-2m" not in counts:
        return None
    return int(counts["blocks-2m"]), int(counts["pages-4k"])


def speed(guest: Guest, vm: Vm, window_s: float, wanted: float = 0.0) -> float:
    """Work per second of the vCPUs' CPU time: what other processes take does not count. The best of a few windows.

    What others do to caches and to the processor's clock does count, and comes and goes: a guest that seems slower
    than `wanted` gets more windows.
    """
    best = 0.0
    for window in range(_MOST_WINDOWS):
        if window >= _WINDOWS and best >= wanted:
            break
        work, cpu = guest.work(guest.mark(vm)), vm.guest_cpu_seconds()
        time.sleep(window_s)
        spent = vm.guest_cpu_seconds() - cpu
        best = max(best, (guest.work(guest.mark(vm)) - work) / spent if spent else 0.0)
    return best


def _wait_for_point(bed: Bed, migration: Migration, transferred: float) -> None:
    """
    :raise BedError: When the migration ended before it came so far.
    """

    def there() -> bool:
        moment = migration.look()
        if moment.status in FINAL:
            raise BedError(f"the migration is {moment.status} before {transferred / 1e6:.0f} MB were sent")
        return moment.transferred >= transferred

    bed.wait(there, _REACH_SECONDS, f"{transferred / 1e6:.0f} MB were not sent", 0.005)


def _runs_on(bed: Bed, guest: Guest, vm: Vm) -> bool:
    try:
        bed.see_it_run(vm, guest)
    except LaunchError:
        return False
    return vm.runs()
