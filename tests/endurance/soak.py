"""Two processes and thousands of migrations that do not complete: does either end grow?

``python -m tests.endurance.soak --migrations 3000``. Each migration is cancelled, or its connection is cut, at a point that a
seed says; as many again go with multifd. Monitors come and go meanwhile. The table has the resident memory of both ends (VmRSS of
proc(5)) whenever both rest; the slope is that of the least-squares line through the last two thirds, in kB per migration: what a
process takes once, in its first migrations, is no growth.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tests.cli.vms import Vm, pair, wait_for
from tests.migration.proxy import Fault, Proxy

from sterna.monitor.addresses import parse_address
from sterna.monitor.client import QmpClient

MOST_KB = 2.0
"""Growth that is taken for none: what a heap's fragments make of thousands of migrations that are cut anywhere."""
_CHANNELS = 4
_BANDWIDTH = 4_000_000
"""Half of what the guest writes: none completes."""
_STREAM_BYTES = 500_000
_LOOKS = 30
_ENDED = ("cancelled", "failed", "completed")


@dataclass(frozen=True)
class Look:
    """Both ends at rest.

    :ivar after: how many migrations there have been
    :ivar source_kb: resident memory
    """

    after: int
    source_kb: int
    destination_kb: int


@dataclass(frozen=True)
class Soaked:
    """:ivar outcomes: of all migrations, by status"""

    looks: tuple[Look, ...]
    outcomes: Counter[str]

    def slopes(self) -> tuple[float, float]:
        """kB per migration, of the source and of the destination."""
        late = self.looks[len(self.looks) // 3 :]
        after = [look.after for look in late]
        return (
            slope(after, [look.source_kb for look in late]),
            slope(after, [look.destination_kb for look in late]),
        )


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Of the least-squares line."""
    return float(np.polyfit(x, y, 1)[0])


def status(vm: Vm, name: str) -> int:
    """A figure of /proc/PID/status."""
    lines = Path(f"/proc/{vm.process.pid}/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))


def soak(migrations: int, *, multifd: bool, report: Callable[[Look], None] = lambda look: None) -> Soaked:
    """Migrate as often as that, and let none complete."""
    rng = random.Random(migrations)
    with (
        tempfile.TemporaryDirectory(prefix="sterna-soak-") as folder,
        pair(Path(folder)) as (source, destination),
    ):
        for end in (source, destination):
            capability = {"capability": "multifd", "state": multifd}
            end.qmp.execute("migrate-set-capabilities", {"capabilities": [capability]})
            end.qmp.execute("migrate-set-parameters", {"multifd-channels": _CHANNELS})
        limits = {"max-bandwidth": _BANDWIDTH, "downtime-limit": 0, "x-sterna-policy": "fixed"}
        source.qmp.execute("migrate-set-parameters", limits)
        # Before, there is so little to send that a migration may complete.
        wait_for(lambda: source.passes() > 0)
        port = int(destination.incoming_uri().rpartition(":")[2])
        rest = [_descriptors(end) for end in (source, destination)]
        looks, outcomes = [], Counter[str]()
        for number in range(1, migrations + 1):
            outcomes[_migrate(source, port, rng)] += 1
            if number % max(1, migrations // _LOOKS) == 0:
                for end, most in zip((source, destination), rest, strict=True):
                    wait_for(lambda end=end, most=most: _descriptors(end) <= most)
                looks.append(Look(number, status(source, "VmRSS"), status(destination, "VmRSS")))
                report(looks[-1])
    return Soaked(tuple(looks), outcomes)


def _descriptors(vm: Vm) -> int:
    """Descriptors that are open after a monitor has come and gone: no more than at first when no migration holds any."""
    with QmpClient.connect(parse_address(vm.address), 60.0) as monitor:
        monitor.command("query-migrate")
    return len(list(Path(f"/proc/{vm.process.pid}/fd").iterdir()))


def _migrate(source: Vm, port: int, rng: random.Random) -> str:
    fault = Fault(forward=rng.randrange(1, _STREAM_BYTES), reset=rng.random() < 0.5)
    with Proxy(port, fault if rng.random() < 0.5 else Fault()) as proxy:
        source.qmp.execute("migrate", {"uri": proxy.uri})
        for _ in range(rng.randrange(20)):
            source.qmp.command("query-migrate")
        source.qmp.command("migrate_cancel")
        wait_for(lambda: source.qmp.command("query-migrate")["status"] in _ENDED)
    return str(source.qmp.command("query-migrate")["status"])


def main() -> None:
    parser = argparse.ArgumentParser(description="Migrate very often, and watch both ends' memory.")
    parser.add_argument("--migrations", type=int, default=3000)
    migrations = parser.parse_args().migrations
    grown = False
    for multifd in (False, True):
        print(
            f"{'with' if multifd else 'without'} multifd: migrations, source (kB), destination (kB)",
            flush=True,
        )
        found = soak(
            migrations,
            multifd=multifd,
            report=lambda look: print(
                f"{look.after:8}{look.source_kb:12}{look.destination_kb:12}", flush=True
            ),
        )
        slopes = found.slopes()
        grown = grown or max(slopes) > MOST_KB
        outcomes = ", ".join(f"{count} {name}" for name, count in sorted(found.outcomes.items()))
        print(
            f"{outcomes}; kB per migration: source {slopes[0]:.2f}, destination {slopes[1]:.2f}", flush=True
        )
    if grown:
        sys.exit(f"an end grows by more than {MOST_KB} kB per migration")


if __name__ == "__main__":
    main()
