"""Things break while a guest migrates."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated, Literal

import msgspec

from sterna.guests.layout import PAGE_BYTES
from sterna.launch.errors import LaunchError, Unsupported, VmError
from sterna.launch.guestview import pages_in_use
from sterna.launch.process import VmProcess
from sterna.launch.watch import FINAL
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.errors import BedError
from sterna.testbed.evidence import Evidence, FaultCase, ProgressSample
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.migration import Migration
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.resources import FullDisk, MemoryGroup

Fault = Literal[
    "link-cut",
    "link-down",
    "destination-killed",
    "source-killed",
    "destination-disk-full",
    "destination-memory-full",
]
Phase = Literal["setup", "first-pass", "later-pass", "switchover"]

_SWITCHOVER_MS = 20_000
"""A downtime limit that any pass meets."""
_CUT_SECONDS = 1.0
_REACH_SECONDS = 60.0
_END_SECONDS = 60.0
_SETTLE_SECONDS = 1.0
"""How long after the last event a guest that must not run is given to start."""
_FIRST_PASS_PART = 0.3


class Case(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """One fault, in each of some phases of a migration."""

    fault: Fault
    phases: Annotated[list[Phase], msgspec.Meta(min_length=1)]


class Faults(BaseProcedure, tag="faults", frozen=True):
    """Break one thing in one phase of a migration, and see where the guest is in the end.

    :ivar cases: what is broken when
    """

    cases: Annotated[list[Case], msgspec.Meta(min_length=1)]

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        source: VmProcess | None = None
        for case in self.cases:
            for phase in case.phases:
                if source is None or not source.alive:
                    source = context.bed.source(context.vm)
                try:
                    source = _FaultInjection(context, source, case.fault, phase).run(evidence)
                except Unsupported as error:
                    evidence.skipped.append(f"{case.fault}: {error}")
                    break


class _FaultInjection:
    """One migration with one fault."""

    def __init__(self, context: ScenarioContext, source: VmProcess, fault: Fault, phase: Phase) -> None:
        self._context = context
        self._bed: Bed = context.bed
        self._source = source
        self._fault = fault
        self._phase = phase
        self._guest: ObservedGuest = context.guest
        self._group: MemoryGroup | None = None
        self._disk: FullDisk | None = None

    def run(self, evidence: Evidence) -> VmProcess | None:
        """Do it.

        :return: the VM that has the guest now, None when it is gone
        :raise Unsupported: When this machine cannot break that.
        """
        bed, source = self._bed, self._source
        bed.say(f"{self._fault} during {self._phase}")
        destination = self._destination()
        bed.warm_up(source, self._guest)
        destination.ready()
        self._migration = Migration(self._impatient(), source, destination, endless=True)
        self._migration.start()
        note = ""
        try:
            self._reach()
        except LaunchError as error:
            note = str(error)
        self._break(destination)
        status = self._outcome()
        if self._fault == "link-down":
            bed.network.set_link(destination.host, up=True)
        time.sleep(_SETTLE_SECONDS)
        survivor, case = self._judge(destination, status, note)
        evidence.injured.append(case)
        self._clear(source, destination, survivor)
        return survivor

    # -- before ----------------------------------------------------------------------------------------------

    def _destination(self) -> VmProcess:
        bed = self._bed
        host = bed.other(self._source.host)
        log = None
        if self._fault == "destination-disk-full":
            self._disk = FullDisk(bed.journal, bed.directory)
            log = str(self._disk.path / "console")
        if self._fault == "destination-memory-full":
            self._group = MemoryGroup(bed.journal)
        if self._fault.startswith("link"):
            bed.network.set_link(host, up=True)  # or say at once that there is none
        destination = bed.destination(self._context.vm, host, log=log)
        if self._group is not None:
            self._group.add(destination.pid)
        return destination

    def _impatient(self) -> ScenarioContext:
        """With a migration that waits no longer than it must for another end that is gone."""
        if not self._bed.kind.verifies:
            return self._context
        waits = {"x-sterna-switchover-timeout": 3000, "x-sterna-doubt-timeout": 2000}
        migration = self._context.migration
        migration = msgspec.structs.replace(migration, parameters=migration.parameters | waits)
        return replace(self._context, migration=migration)

    def _reach(self) -> None:
        """
        :raise BedError: When the migration ends before the phase comes.
        """
        if self._phase == "setup":
            return
        used = pages_in_use(self._guest.mark(self._source)) * PAGE_BYTES
        reached: dict[str, Callable[[ProgressSample], bool]] = {
            "first-pass": lambda sample: sample.transferred >= _FIRST_PASS_PART * used,
            "later-pass": lambda sample: sample.pass_number >= 3,
            # A QEMU that does not pause before it says so only by having stopped the guest.
            "switchover": lambda sample: (
                sample.status == "device" or (sample.status == "active" and not self._source.runs())
            ),
        }
        if self._phase == "switchover":
            self._wait_for(reached["later-pass"])
            self._migration.let_end(_SWITCHOVER_MS)
        self._wait_for(reached[self._phase])

    def _wait_for(self, reached: Callable[[ProgressSample], bool]) -> None:
        def there() -> bool:
            sample = self._migration.sample()
            if not reached(sample) and sample.status in FINAL:
                raise BedError(f"it is {sample.status} before the phase comes")
            return reached(sample)

        self._bed.wait(there, _REACH_SECONDS, f"the phase {self._phase} does not come", 0.002)

    # -- the fault -------------------------------------------------------------------------------------------

    def _break(self, destination: VmProcess) -> None:
        network = self._bed.network
        match self._fault:
            case "link-cut":
                network.set_link(destination.host, up=False)
                time.sleep(_CUT_SECONDS)
                network.set_link(destination.host, up=True)
            case "link-down":
                network.set_link(destination.host, up=False)
            case "destination-killed":
                destination.kill()
            case "source-killed":
                self._source.kill()
            case "destination-disk-full":
                assert self._disk is not None
                self._disk.fill()
            case "destination-memory-full":
                assert self._group is not None
                self._group.limit(self._group.usage())
        if self._source.alive:
            self._migration.let_end(_SWITCHOVER_MS)

    def _outcome(self) -> str:
        """What became of the migration; one that cannot end because the link is down is cancelled."""
        if not self._source.alive:
            return "the source is gone"
        if self._fault == "link-down":
            time.sleep(_CUT_SECONDS)
            if self._migration.sample().status not in (*FINAL, "device"):
                return self._migration.cancel()[0]

        def ended() -> bool:
            return self._migration.sample().status in FINAL

        try:
            self._bed.wait(ended, _END_SECONDS, "it does not end")
        except VmError as error:
            return str(error)
        return str(self._migration.record.info["status"])

    # -- after -----------------------------------------------------------------------------------------------

    def _judge(self, destination: VmProcess, status: str, note: str) -> tuple[VmProcess | None, FaultCase]:
        here = [vm for vm in (self._source, destination) if _runs(vm)]
        problems: list[str] = []
        pages = 0
        if len(here) == 1:
            [vm] = here
            try:
                self._bed.see_it_run(vm, self._guest)
            except LaunchError as error:
                problems.append(str(error))
            pages, wrong = self._guest.check(vm)
            problems += wrong
        case = FaultCase(
            self._fault,
            self._phase,
            status,
            [vm.host.name for vm in here],
            self._allowed(destination),
            self._fault == "source-killed",
            pages,
            problems,
            note,
        )
        return (here[0] if len(here) == 1 and not problems else None), case

    def _allowed(self, destination: VmProcess) -> list[str]:
        """Where the guest may be. In the switchover it may have just been handed over."""
        there, back = destination.host.name, self._source.host.name
        match self._fault:
            case "link-cut" | "destination-disk-full":
                return [there]
            case "destination-memory-full":
                return [there, back]
            case "source-killed":
                return [there] if self._phase == "switchover" else []
            case _:
                return [there, back] if self._phase == "switchover" else [back]

    def _clear(self, source: VmProcess, destination: VmProcess, survivor: VmProcess | None) -> None:
        for vm in (source, destination):
            if vm is not survivor:
                vm.close()
        if self._disk is not None:
            self._disk.close()
        if self._group is not None:
            self._group.close()


def _runs(vm: VmProcess) -> bool:
    try:
        return vm.alive and vm.runs()
    except VmError:
        return False
