"""The ways to keep a dirty log that this host's KVM has, and their figures: for people, for machines, and what of the goals they
reach.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from sterna.bench.kvm.measure import QUICK, ModeFigures, Sizes, Times, measure
from sterna.bench.report import print_goals
from sterna.bench.summary import GoalResult
from sterna.bench.table import print_table
from sterna.host.load import HostLoad, HostWatch
from sterna.host.units import format_size
from sterna.hypervisor.accelerator import ACCELERATORS, open_vm
from sterna.hypervisor.interface import DirtyLogMode, Unsupported
from sterna.machine.board import BOARDS

_GIB = 1 << 30
_TIMES = ("ours", "kernel", "own")
_SPARSE = "harvest, 1 % of all"
_MOST_PERCENT = 10.0
_MOST_MS = 5.0
_JUDGED = ("harvest, all", _SPARSE)
"""Calls that the kernel works in. A percentage of moments says nothing; and switching a log, it waits for its own readers."""
_CALLS = ("", "\n", "call\nms", "kernel\nms", "own\nms", "own\n%", "call\nms/GiB", "kernel\nms/GiB")
_GUEST = (
    *("", "write fault, us\nfirst pass", "write fault, us\nafter harvest"),
    *("writes/us\nno log", "writes/us\nlog", "writes/us\nharvested 10/s"),
)


def find_modes(asked: Sequence[str]) -> "Modes":
    """Try each: a VM is made.

    :raise HypervisorError: When one cannot be made though this host has it.
    """
    there, missing = [], {}
    arch = BOARDS.get(ACCELERATORS.get("kvm").board).arch
    for mode in dict.fromkeys(map(DirtyLogMode, asked)):
        try:
            open_vm("kvm", arch, dirty_log=mode).close()
            there.append(mode)
        except Unsupported as error:
            missing[mode.value] = str(error)
    return Modes(there, missing)


@dataclass(frozen=True)
class Modes:
    """:ivar there: those that this host has, of those asked for
    :ivar missing: the others, and why
    :ivar figures: what was measured; empty before
    :ivar host: how busy the host was meanwhile
    """

    there: Sequence[DirtyLogMode]
    missing: Mapping[str, str]
    sizes: Sizes = field(default_factory=Sizes)
    figures: Sequence[ModeFigures] = ()
    host: HostLoad | None = None

    def measured(
        self, quick: bool, rounds: int, check: Callable[[], None], note: Callable[[str], None]
    ) -> "Modes":
        """These with their figures.

        :param quick: small memory, few rounds
        :raise HypervisorError, RamError: As `measure`.
        """
        sizes = QUICK if quick else Sizes(rounds=rounds)
        figures, watch = [], HostWatch()
        for mode in self.there:
            figures.append(measure(mode, sizes, check))
            note(f"dirty log, {mode}: measured")
        return replace(self, sizes=sizes, figures=figures, host=watch.load())

    def goals(self) -> list[GoalResult]:
        """What our calls are to take above the kernel's own time, on full-sized memory."""
        judged = []
        for one in self.figures if self.sizes != QUICK else ():
            sparse = one.calls[_SPARSE]
            above = sparse.ms("own")
            judged.append(
                GoalResult(
                    f"dirty log, {one.mode}",
                    f"harvest of {format_size(sparse.bytes)}, 1 % dirty: under {_MOST_MS:g} ms above the ioctl",
                    f"{above:.2f} ms",
                    above < _MOST_MS,
                )
            )
            for name in _JUDGED:
                if one.mode is DirtyLogMode.RING and name != _SPARSE:
                    continue  # most of such a ring has been emptied when it was full
                times = one.calls[name]
                judged.append(
                    GoalResult(
                        f"dirty log, {one.mode}",
                        f"{name}: under {_MOST_PERCENT:g} % above the ioctl",
                        f"{times.overhead_percent:.1f} %, {times.ms('own'):.2f} ms",
                        times.overhead_percent < _MOST_PERCENT,
                    )
                )
        return judged

    def add_to(self, result: dict[str, Any]) -> dict[str, Any]:
        """The report of the migrations as JSON has it, with the dirty log's figures and goals; times in ms are medians."""
        log = {
            "dense_bytes": self.sizes.dense_bytes,
            "sparse_bytes": self.sizes.sparse_bytes,
            "rounds": self.sizes.rounds,
            "missing": dict(self.missing),
            "modes": {
                one.mode.value: {
                    "write_fault_us": dict(one.fault_us),
                    "writes_per_second": dict(one.writes),
                    "calls": {name: _call(times) for name, times in one.calls.items()},
                }
                for one in self.figures
            },
            "host": self.host and vars(self.host),
        }
        goals = [*result["goals"], *(vars(one) for one in self.goals())]
        return result | {"dirty_log": log if self.figures else None, "goals": goals}

    def print(self, console: Console) -> None:
        """Print them, and the goals."""
        if self.figures or self.missing:
            self.print_calls(console)
        goals = self.goals()
        print_goals(console, goals)
        if any(one.met is False for one in goals):
            console.print(f"dirty log: {self.host}", soft_wrap=True, highlight=False)

    def print_calls(self, console: Console) -> None:
        """Tables of the calls and of the guest."""
        sizes = self.sizes
        about = f"dirty log: {format_size(sizes.dense_bytes)} written by one vCPU; 1 % of all: of "
        about += f"{format_size(sizes.sparse_bytes)}; medians of {sizes.rounds}"
        for line in (about, *(f"{mode}: {why}" for mode, why in self.missing.items())):
            console.print(line, soft_wrap=True, highlight=False)
        if self.figures:
            print_table(console, _CALLS, [_calls(one) for one in self.figures], labels=2)
            print_table(console, _GUEST, [[_guest(one) for one in self.figures]])


def _call(times: Times) -> dict[str, Any]:
    return {
        "bytes": times.bytes,
        **{f"{which}_ms": times.ms(which) for which in _TIMES},
        "overhead_percent": times.overhead_percent,
        **{f"each_{which}_ms": [seconds * 1e3 for seconds in getattr(times, which)] for which in _TIMES},
    }


def _calls(figures: ModeFigures) -> list[list[str]]:
    rows = []
    for number, (name, times) in enumerate(figures.calls.items()):
        gib = times.bytes / _GIB
        cells = [f"{times.ms(which):.2f}" for which in _TIMES]
        cells += [f"{times.overhead_percent:.0f}", *(f"{times.ms(who) / gib:.2f}" for who in _TIMES[:2])]
        rows.append(["" if number else figures.mode.value, name, *cells])
    return rows


def _guest(figures: ModeFigures) -> list[str]:
    faults = (f"{figures.fault_us[name]:.2f}" for name in ("first", "later"))
    writes = (f"{figures.writes[name] / 1e6:.2f}" for name in ("no log", "log", "harvests"))
    return [figures.mode.value, *faults, *writes]
