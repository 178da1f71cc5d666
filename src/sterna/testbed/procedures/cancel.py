"""Migrations are cancelled, each further on than the one before."""

import time
from dataclasses import dataclass, replace
from typing import Annotated

import msgspec

from sterna.guests.layout import PAGE_BYTES
from sterna.launch.errors import LaunchError, VmError
from sterna.launch.guestview import pages_in_use
from sterna.launch.process import VmProcess
from sterna.launch.watch import FINAL
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.errors import BedError
from sterna.testbed.evidence import CancelRecord, Evidence, HugePages, ProgressSample
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.migration import Migration
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.settings import MigrationSettings, Positive

_REACH_SECONDS = 60.0
_REBUILD_SECONDS = 3.0
"""Within this time a guest at work writes all its pages, also on a host that keeps it from its processors for a second."""
_SAMPLE_SECONDS = 0.05
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

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        bed = context.bed
        guest = context.guest
        source = bed.source(context.vm)
        destination = bed.destination(context.vm)
        bed.warm_up(source, guest)
        destination.ready()
        used = pages_in_use(guest.mark(source)) * PAGE_BYTES
        counter = _Counter(bed, source, evidence)
        evidence.blocks_before = counter.sample()
        # Once unmeasured: a CPU emulator's TLB is larger after it.
        for number, point in enumerate((self.points[0], *self.points)):
            if number == 1:
                evidence.speeds.append(speed(guest, source, self.window_s))
            migration = Migration(context, source, destination, endless=True, watch=counter.watch)
            bed.say(f"cancel when {point:g} of RAM is sent")
            counter.begin()
            migration.start()
            _wait_for_point(bed, migration, point * used)
            transferred = migration.record.moments[-1].transferred
            at = bed.now()
            status, ms = migration.cancel()
            runs = _runs_on(bed, guest, source)
            after = counter.rebuilt(evidence.blocks_before)
            if number:
                cancelled = CancelRecord(at, point, transferred, status, ms, runs, counter.least, after)
                evidence.cancelled.append(cancelled)
            if not bed.kind.waits_again:
                destination.close()
                destination = bed.destination(context.vm)
                destination.ready()
        evidence.speeds.append(speed(guest, source, self.window_s, evidence.speeds[0]))
        last = replace(context, migration=self.finish)
        migration = Migration(last, source, destination, watch=counter.watch)
        evidence.passages.append(migration.record)
        bed.say("migrate to the end")
        migration.run()
        migration.arrive()


@dataclass
class _Counter:
    """Counts a VM's huge pages over time, where it tells them.

    :ivar least: fewest since `begin`
    """

    bed: Bed
    vm: VmProcess
    evidence: Evidence
    least: int | None = None

    def begin(self) -> None:
        self.least = None
        self.sample()

    def watch(self, sample: ProgressSample) -> None:
        """With each sample of a migration."""
        self.sample()

    def sample(self) -> int | None:
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
        least, blocks = self.least, self.sample()
        changed = time.monotonic()
        while blocks is not None and wanted is not None and blocks < wanted:
            time.sleep(_SAMPLE_SECONDS)
            now = self.sample()
            if now != blocks:
                changed = time.monotonic()
            elif time.monotonic() - changed > _REBUILD_SECONDS:
                break
            blocks = now
        self.least = least
        return blocks


def huge_pages(vm: VmProcess) -> tuple[int, int] | None:
    """Mappings of 2 MiB and of 4 KiB in stage 2; None when the VM does not tell."""
    try:
        counts = vm.command("x-sterna-query-stage2")
    except VmError:
        return None
    if "blocks-2m" not in counts:
        return None
    return int(counts["blocks-2m"]), int(counts["pages-4k"])


def speed(guest: ObservedGuest, vm: VmProcess, window_s: float, wanted: float = 0.0) -> float:
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
        sample = migration.sample()
        if sample.status in FINAL:
            raise BedError(f"the migration is {sample.status} before {transferred / 1e6:.0f} MB were sent")
        return sample.transferred >= transferred

    bed.wait(there, _REACH_SECONDS, f"{transferred / 1e6:.0f} MB were not sent", 0.005)


def _runs_on(bed: Bed, guest: ObservedGuest, vm: VmProcess) -> bool:
    try:
        bed.see_it_run(vm, guest)
    except LaunchError:
        return False
    return vm.runs()
