"""One migration, measured: the same steps and clocks whichever hypervisor does it.

- **Seconds**: from the `migrate` command to the event that the migration completed, as its user sees it.
- **Total time, downtime, bytes, passes**: as the source's query-migrate tells when it is over. **Predicted** downtime: the
last `expected-downtime` before it was. A QEMU begins with its limit there, until it knows better: that predicts nothing.
- **CPU**: user and system time of the process between those two moments, its guest's included.
- **Writes**: of `dirtyram`, a page each, from the guest's own counter: in the second before the migration, and from its
beginning until the guest runs at the destination, downtime included. **Speed** of the guest: the second by the first;
of a migration that takes no longer than a few of its steps it says little.
- **Throttle**: the most of its time that auto-converge, or a policy of sterna's, took from the guest.
"""

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from sterna.guests.layout import STATUS_OFFSET, ProgramId
from sterna.host.load import HostLoad, HostWatch, cpu_seconds
from sterna.launch.errors import VmError
from sterna.launch.guestview import known_status, pages_written
from sterna.launch.process import VmProcess
from sterna.launch.watch import FINAL, wait_for, wait_warm, watch
from sterna.monitor.client import ConnectionLost

_WARM_UP_SECONDS = 300.0
_POLL_SECONDS = 0.1
"""How often the migration is asked how it goes: often enough for a prediction, too rarely to be felt."""
_PAUSE_SECONDS = 0.05
_RATE_SECONDS = 1.0
_WRITES_SECONDS = 30.0
"""A host may keep a guest from its processors for a second."""
_CANCEL_SECONDS = 30.0
_ARRIVES_SECONDS = 30.0
_ARRIVES_PAUSE_SECONDS = 0.002


class RunOutcome(Enum):
    COMPLETED = "completed"
    DIVERGED = "did not converge"
    FAILED = "failed"


@dataclass(frozen=True)
class Measurement:
    """One migration. Times that QEMU tells are whole ms.

    :ivar error: why it failed
    :ivar verified: both ends' RAM was compared and equal; None when it was not compared
    :ivar predicted_ms: None when nothing was predicted
    :ivar writes_before: pages the guest wrote in a second before; None for an idle guest
    :ivar throttle_percent: the most that was seen; None where there is no guest that writes
    :ivar host: how busy the host was meanwhile
    """

    outcome: RunOutcome
    seconds: float
    bytes: int = 0
    total_ms: float | None = None
    downtime_ms: float | None = None
    predicted_ms: float | None = None
    passes: int | None = None
    source_cpu_s: float = 0.0
    destination_cpu_s: float = 0.0
    verified: bool | None = None
    error: str = ""
    writes_before: float | None = None
    writes_during: float | None = None
    throttle_percent: int | None = None
    host: HostLoad | None = None

    @property
    def guest_speed(self) -> float | None:
        """Of an unmigrated guest's; 1 when it was not slowed."""
        if not self.writes_before or self.writes_during is None:
            return None
        return self.writes_during / self.writes_before

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"outcome": self.outcome.value, "guest_speed": self.guest_speed}


def migrate(
    source: VmProcess,
    destination: VmProcess,
    ram_base: int,
    limit_ms: int,
    timeout: float,
    check: Callable[[], None],
) -> Measurement:
    """Wait until the guest works at its steady pace, and migrate it.

    :param limit_ms: of its downtime, as it was set
    :param timeout: seconds after which it is cancelled and counts as not converging
    :param check: called now and then; may raise
    :raise VmError: When anything but the migration fails.
    """
    before = wait_warm(source, ram_base + STATUS_OFFSET, _WARM_UP_SECONDS, HostWatch(), check)
    rate = _write_rate(source, ram_base, check) if before.program is ProgramId.DIRTYRAM else None
    uri = destination.incoming_uri()
    host = HostWatch()
    asked, writes = time.monotonic(), _writes(source, ram_base)
    cpu = [cpu_seconds(vm.pid) for vm in (source, destination)]
    started = time.monotonic()
    source.command("migrate", uri=uri)
    watched = _watch(source, limit_ms, started + timeout, check)
    seconds = time.monotonic() - started
    source_cpu, destination_cpu = (
        cpu_seconds(vm.pid) - spent for vm, spent in zip((source, destination), cpu, strict=True)
    )
    info = watched.info
    status = info.get("status")
    during = None
    if rate is not None and status in ("completed", "cancelled"):
        if status == "completed":
            # Before it runs there, a QEMU may refuse to read its memory.
            late, often = f"the guest does not run at the {destination.name}", _ARRIVES_PAUSE_SECONDS
            wait_for(destination.runs, _ARRIVES_SECONDS, late, host, check=check, poll_seconds=often)
        now = _writes(destination if status == "completed" else source, ram_base)
        during = (now - writes) / (time.monotonic() - asked)
    own = info.get("x-sterna", {})
    throttles = [watched.throttle_percent, *(one["throttle_percent"] for one in own.get("passes", []))]
    ram = info.get("ram", {})
    outcome = {"completed": RunOutcome.COMPLETED, "cancelled": RunOutcome.DIVERGED}.get(
        str(status), RunOutcome.FAILED
    )
    return Measurement(
        outcome,
        seconds,
        bytes=ram.get("transferred", 0),
        total_ms=own.get("total-ms", info.get("total-time")),
        downtime_ms=own.get("downtime-ms", info.get("downtime")) if outcome is RunOutcome.COMPLETED else None,
        predicted_ms=own.get("predicted-downtime-ms", watched.predicted_ms),
        passes=ram.get("dirty-sync-count"),
        source_cpu_s=source_cpu,
        destination_cpu_s=destination_cpu,
        verified=own.get("verified"),
        error=str(info.get("error-desc", "")),
        writes_before=rate,
        writes_during=during,
        throttle_percent=None if rate is None else max(throttles),
        host=host.load(),
    )


@dataclass
class _Watched:
    """:ivar info: how the migration ended, as query-migrate tells"""

    info: Mapping[str, Any]
    predicted_ms: float | None = None
    throttle_percent: int = 0

    def note(self, info: Mapping[str, Any], limit_ms: int) -> None:
        """Note what a migration under way says."""
        expected = info.get("expected-downtime")
        if expected is not None and (expected != limit_ms or self.predicted_ms is not None):
            self.predicted_ms = expected
        self.throttle_percent = max(self.throttle_percent, info.get("cpu-throttle-percentage", 0))


def _watch(source: VmProcess, limit_ms: int, deadline: float, check: Callable[[], None]) -> _Watched:
    """Follow the migration to its end; past the deadline, cancel it."""
    watched = _Watched({})
    cancelled = False

    def note(info: Mapping[str, Any]) -> None:
        nonlocal cancelled, deadline
        check()
        watched.note(info, limit_ms)
        now = time.monotonic()
        if cancelled and now > deadline:
            raise VmError(f"the {source.name} did not cancel its migration in {_CANCEL_SECONDS:g} s")
        if now > deadline:
            cancelled, deadline = True, now + _CANCEL_SECONDS
            source.command("migrate_cancel")

    watched.info = watch(lambda: source.command("query-migrate"), note, lambda: _wait_for_end(source))
    return watched


def _wait_for_end(source: VmProcess) -> None:
    """Wait for the event that tells of the outcome, but not for long."""
    with suppress(TimeoutError):
        try:
            source.qmp.wait_event(
                lambda event: event["event"] == "MIGRATION" and event["data"]["status"] in FINAL,
                _POLL_SECONDS,
            )
        except ConnectionLost as error:
            raise VmError(f"the {source.name} was lost during the migration: {error}") from error


# -- the guest -----------------------------------------------------------------------------------------------


def _write_rate(source: VmProcess, ram_base: int, check: Callable[[], None]) -> float:
    """
    :raise WaitedTooLong: When the guest writes nothing at all.
    """
    started, before = time.monotonic(), _writes(source, ram_base)
    while time.monotonic() < started + _RATE_SECONDS:
        check()
        time.sleep(_PAUSE_SECONDS)
    written = 0

    def writes() -> bool:
        nonlocal written
        written = _writes(source, ram_base) - before
        return written > 0

    wait_for(
        writes, _WRITES_SECONDS, f"the guest of the {source.name} writes nothing", HostWatch(), check=check
    )
    return written / (time.monotonic() - started)


def _writes(vm: VmProcess, ram_base: int) -> int:
    """Pages that its guest has written so far; 0 of one that does not count them."""
    return pages_written(known_status(vm, ram_base + STATUS_OFFSET))
