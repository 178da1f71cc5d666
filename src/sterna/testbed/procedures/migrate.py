"""One guest after another migrates to and fro."""

import time
from typing import Any

import msgspec

from sterna.launch.process import VmProcess
from sterna.testbed.bed import ScenarioContext
from sterna.testbed.evidence import Evidence
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.migration import Migration
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.settings import Count, MigrationSettings, ScenarioTable, Seconds, VmSettings

_QUIET_SECONDS = 0.3
_QUIET_AT_MOST_SECONDS = 3.0


class Load(ScenarioTable, frozen=True):
    """A guest's work, and how it is migrated; what is not given is the scenario's."""

    arguments: str
    smp: Count | None = None
    program: str | None = None
    capabilities: list[str] | None = None
    parameters: dict[str, bool | int | str] | None = None

    def apply(self, vm: VmSettings, migration: MigrationSettings) -> tuple[VmSettings, MigrationSettings]:
        """The scenario's settings with this load's in their place."""
        changes: dict[str, Any] = {"arguments": self.arguments}
        changes |= {name: value for name in ("smp", "program") if (value := getattr(self, name)) is not None}
        more = {
            name: value
            for name in ("capabilities", "parameters")
            if (value := getattr(self, name)) is not None
        }
        return msgspec.structs.replace(vm, **changes), msgspec.structs.replace(migration, **more)


class Migrate(BaseProcedure, tag="migrate", frozen=True):
    """Migrate a guest from host 1 to host 2 and, when `times` says so, back and on.

    :ivar times: migrations of each guest
    :ivar loads: one guest after the other; none: the scenario's
    :ivar hold: the destination holds the guest back until RAM has been compared
    :ivar observe: watch both ends' memory for signs of life
    :ivar dwell_s: how long the guest is left alone before and after a migration
    :ivar console: keep what the guest says
    :ivar content: compare its memory after each migration
    """

    times: Count = 1
    loads: list[Load] = msgspec.field(default_factory=list)
    hold: bool = False
    observe: bool = False
    dwell_s: Seconds = 0.0
    console: bool = False
    content: bool = True

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        settings = [(context.vm, context.migration)]
        if self.loads:
            settings = [load.apply(context.vm, context.migration) for load in self.loads]
        for vm, migration in settings:
            self._run_guest(ScenarioContext(context.bed, vm, migration), evidence)

    def _run_guest(self, context: ScenarioContext, evidence: Evidence) -> None:
        bed = context.bed
        guest = context.guest
        source = bed.source(context.vm)
        visited = [source]
        waiting = bed.destination(context.vm, hold=self.hold)
        bed.warm_up(source, guest)
        settled = time.monotonic()
        for number in range(1, self.times + 1):
            destination = waiting
            destination.ready()
            migration = Migration(context, source, destination, observe=self.observe)
            time.sleep(self.dwell_s)
            evidence.passages.append(migration.record)
            bed.say(
                f"migration {number} of {self.times} under {context.vm.load}, {source.host.name} to {destination.host.name}"
            )
            migration.run()
            # Early, so that it is up when its turn comes; but one with a network card needs the source's tap.
            if number < self.times and not bed.kind.connected:
                waiting = bed.destination(context.vm, bed.other(destination.host), hold=self.hold)
            migration.arrive(hold=self.hold, check=self.content)
            if migration.record.info.get("status") != "completed":
                destination.close()
                break
            visited.append(destination)
            time.sleep(self.dwell_s)
            source.close()
            source = destination
            if number < self.times and bed.kind.connected:
                waiting = bed.destination(context.vm, bed.other(destination.host), hold=self.hold)
        if self.console:
            self._keep_console(guest, evidence, visited, settled)
        source.close()

    @staticmethod
    def _keep_console(
        guest: ObservedGuest, evidence: Evidence, visited: list[VmProcess], since: float
    ) -> None:
        """The lines that came since then."""
        from sterna.launch.console import join_lines

        visited[-1].command("stop")
        visited[-1].console.wait_quiet(_QUIET_SECONDS, _QUIET_AT_MOST_SECONDS)
        lines = guest.own_lines(join_lines([vm.console for vm in visited]))
        evidence.lines["guest"] = [line for line in lines if line.arrived >= since]
