"""Several guests migrate at once."""

import time
from typing import Annotated, Literal

import msgspec

from sterna.launch.process import VmProcess
from sterna.testbed.bed import ScenarioContext
from sterna.testbed.evidence import Evidence
from sterna.testbed.migration import Migration
from sterna.testbed.procedures.procedure import BaseProcedure
from sterna.testbed.settings import Count, Seconds

_POLL_SECONDS = 0.02


class Many(BaseProcedure, tag="many", frozen=True):
    """Guests share the links: all begin at once, or one after the other while those before are still under way.

    :ivar counts: how many guests; each number in turn, and those that are there go on
    :ivar ways: each number of guests migrates in each of these ways, to and fro
    :ivar stagger_s: between the beginnings
    """

    counts: Annotated[list[Count], msgspec.Meta(min_length=1)] = msgspec.field(default_factory=lambda: [2, 4])
    ways: Annotated[list[Literal["parallel", "staggered"]], msgspec.Meta(min_length=1)] = msgspec.field(
        default_factory=lambda: ["parallel", "staggered"]
    )
    stagger_s: Seconds = 0.3

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        bed = context.bed
        guest = context.guest
        sources: list[VmProcess] = []
        for count in self.counts:
            here = sources[0].host if sources else bed.hosts[0]
            names = [f"guest {number}" for number in range(1, count + 1)]
            for source in sources[count:]:
                source.close()
            sources = sources[:count] + [bed.source(context.vm, here, name) for name in names[len(sources) :]]
            for way in self.ways:
                host = bed.other(sources[0].host)
                destinations = [bed.destination(context.vm, host, name) for name in names]
                for source in sources:
                    bed.warm_up(source, guest)
                for destination in destinations:
                    destination.ready()
                load = f"{context.vm.load}, {count} at once, {way}"
                migrations = [
                    Migration(context, source, destination, name=name, load=load)
                    for name, source, destination in zip(names, sources, destinations, strict=True)
                ]
                bed.say(f"{count} guests to {host.name}, {way}")
                evidence.passages += [migration.record for migration in migrations]
                _run(migrations, self.stagger_s if way == "staggered" else 0.0)
                for migration in migrations:
                    migration.arrive()
                for source in sources:
                    source.close()
                sources = destinations
                if not all(migration.record.completed for migration in migrations):
                    return
        for source in sources:
            source.close()


def _run(migrations: list[Migration], apart: float) -> None:
    waiting = list(migrations)
    under_way: list[Migration] = []
    next_start = time.monotonic()
    while waiting or under_way:
        if waiting and time.monotonic() >= next_start:
            migration = waiting.pop(0)
            migration.start()
            under_way.append(migration)
            next_start += apart
            continue
        under_way = [migration for migration in under_way if not migration.poll()]
        time.sleep(_POLL_SECONDS)
