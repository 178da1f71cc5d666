"""One migration between two processes, from start to outcome."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any

from sterna.cli.display import Display
from sterna.cli.progressestimate import ProgressEstimate
from sterna.cli.result import summarise
from sterna.cli.watch import watch_migration
from sterna.guests.layout import STATUS_OFFSET, Status
from sterna.host.load import HostWatch
from sterna.launch.command import sterna_arguments
from sterna.launch.errors import LaunchError
from sterna.launch.guestview import (
    check_content,
    known_status,
    migration_gap,
    pages_in_use,
    runs_beyond,
)
from sterna.launch.process import SternaProcess, VmProcess
from sterna.launch.signals import Interrupts
from sterna.launch.watch import wait_for, wait_warm
from sterna.machine.config import MachineConfig

_WARM_UP_SECONDS = 600.0
_RUNS_SECONDS = 20.0
_POLL_SECONDS = 0.05
_THROTTLE = {"cpu-throttle-initial": 60, "cpu-throttle-increment": 20, "max-cpu-throttle": 95}
"""For a guest that dirties memory faster than this host copies it: bolder than the defaults, a demonstration is short."""
_CLOCK_SLACK_MS = 5.0
"""How much less than the downtime the guest may have seen: what it reads is not when it stops."""
_GAP_SLACK_MS = 500.0
"""How much more: the host's scheduler, at both ends."""


@dataclass(frozen=True)
class DemoSettings:
    """:ivar config: of the source's machine
    :ivar bandwidth: bytes per second, 0 for no limit
    :ivar policy: migration parameters that choose it
    :ivar audit: whether the source audits every harvest of its dirty log
    """

    config: MachineConfig
    bandwidth: int
    downtime_limit_ms: int
    auto_converge: bool
    policy: Mapping[str, Any] = field(default_factory=dict)
    audit: bool = False


def run_demo(settings: DemoSettings, display: Display, interrupts: Interrupts) -> dict[str, Any]:
    """Start source and destination, migrate, check.

    :return: what `sterna demo --json` prints
    :raise Error: When something other than the migration fails.
    """
    demo = _DemoRun(settings, display, interrupts)
    with ExitStack() as stack:
        return demo.run(stack)


class _DemoRun:
    def __init__(self, settings: DemoSettings, display: Display, interrupts: Interrupts) -> None:
        self._settings = settings
        self._display = display
        self._interrupts = interrupts
        self._ram_base = int(settings.config.board.ram_base)
        self._during: dict[str, int] = {}
        self._throttle = 0
        self._host = HostWatch()

    def run(self, stack: ExitStack) -> dict[str, Any]:
        config = self._settings.config
        self._source = stack.enter_context(SternaProcess("source", sterna_arguments(config)))
        waiting = sterna_arguments(config, incoming="tcp:127.0.0.1:0")
        self._destination = stack.enter_context(SternaProcess("destination", waiting))
        for vm in (self._source, self._destination):
            vm.ready(self._interrupts.check)
        address = self._ram_base + STATUS_OFFSET
        wait_warm(self._source, address, _WARM_UP_SECONDS, self._host, self._interrupts.check)
        before = self._stage2()
        self._host = HostWatch()
        summary = self._migrate()
        if summary["status"] != "completed":
            host = asdict(self._host.load())
            return summary | {"verified": False, "problems": [demo_outcome_line(summary)], "host": host}
        result = self._check(summary)
        result["stage2"] = {"before": before, "during": self._during, "after": self._after}
        return result

    # -- phases ----------------------------------------------------------------------------------------------

    def _migrate(self) -> dict[str, Any]:
        parameters = {
            "max-bandwidth": self._settings.bandwidth,
            "downtime-limit": self._settings.downtime_limit_ms,
            "x-sterna-verify": "on",
            "x-sterna-audit": self._settings.audit,
            **_THROTTLE,
            **self._settings.policy,
        }
        self._source.command("migrate-set-parameters", **parameters)
        converge = {"capability": "auto-converge", "state": self._settings.auto_converge}
        self._source.command("migrate-set-capabilities", capabilities=[converge])
        self._source.command("migrate", uri=self._destination.incoming_uri())
        info = watch_migration(self._source.qmp, self._display, self._interrupts, self._watch, _POLL_SECONDS)
        summary = summarise(info)
        return summary | {"throttle_percent": max(summary["throttle_percent"], self._throttle)}

    def _watch(self, estimate: ProgressEstimate) -> None:
        self._throttle = max(self._throttle, estimate.throttle_percent)
        if estimate.status == "active":
            self._during = self._stage2()

    def _check(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Everything that must hold after a migration that completed."""
        self._after = self._stage2()
        last = self._status(self._source)
        self._source.close()
        arrived: list[Status] = []

        def running() -> bool:
            arrived[:] = [self._status(self._destination)]
            return runs_beyond(last, arrived[0])

        problems: list[str] = []
        try:
            self._wait(running, "the guest does not run at the destination")
            problems += check_content(
                self._destination, self._ram_base, self._settings.config.memory_bytes, arrived[0]
            )
            checked = arrived[0]
            self._wait(
                lambda: self._status(self._destination).steps() > checked.steps(),
                "the guest does not go on at the destination",
            )
        except LaunchError as error:
            problems.append(str(error))
        gap = migration_gap(last, arrived[0])
        downtime = float(summary["downtime_ms"])
        if gap.exact and gap.ms < downtime - _CLOCK_SLACK_MS:
            problems.append(f"the guest's counter saw {gap.ms:.1f} ms of {downtime:.1f} ms of downtime")
        if gap.exact and gap.ms > downtime + _GAP_SLACK_MS:
            problems.append(f"the guest's counter saw {gap.ms:.1f} ms, the downtime was {downtime:.1f} ms")
        if not summary["verified"]:
            problems.append("RAM was not compared")
        if summary["ram_digest_source"] != summary["ram_digest_destination"]:
            problems.append("the digests of RAM differ")
        return summary | {
            "verified": not problems,
            "problems": problems,
            "host": asdict(self._host.load()),
            "guest_gap_ms": round(gap.ms, 3),
            # A throttled vCPU also stands still before the switchover: its gap is longer than the migration's.
            "guest_gap_exact": gap.exact and not summary["throttle_percent"],
            "guest": {
                "steps_before": last.steps(),
                "steps_after": self._status(self._destination).steps(),
                "pages_checked": pages_in_use(last),
                "backward_steps": arrived[0].backward_steps(),
            },
        }

    # -- asking ----------------------------------------------------------------------------------------------

    def _status(self, vm: VmProcess) -> Status:
        return known_status(vm, self._ram_base + STATUS_OFFSET)

    def _stage2(self) -> dict[str, int]:
        answer: Mapping[str, int] = self._source.command("x-sterna-query-stage2")
        return {name.replace("-", "_"): value for name, value in answer.items()}

    def _wait(self, condition: Callable[[], bool], otherwise: str) -> None:
        """
        :raise WaitedTooLong: When the condition does not come true in time.
        :raise KeyboardInterrupt: On a signal that ends commands.
        """
        wait_for(condition, _RUNS_SECONDS, otherwise, self._host, check=self._interrupts.check)


def demo_outcome_line(summary: Mapping[str, Any]) -> str:
    """The outcome of what did not complete, in one line: both machines end with the demo."""
    if summary["status"] == "cancelled":
        return "cancelled: nothing was migrated, both machines have been ended"
    return f"{summary['status']}: {summary['error'] or 'no reason given'}; both machines have been ended"
