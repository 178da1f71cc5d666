"""The ways to keep a dirty log that this host's KVM has, and their figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rich.console import Console

from sterna.bench.kvm import report
from sterna.bench.kvm.measure import QUICK, ModeFigures, Sizes, measure
from sterna.bench.report import print_goals
from sterna.bench.summary import Judgement
from sterna.host.load import HostLoad, HostWatch
from sterna.hypervisor.accelerator import ACCELERATORS, open_vm
from sterna.hypervisor.interface import DirtyLogMode, Unsupported
from sterna.machine.board import BOARDS


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

    @property
    def _goals(self) -> list[Judgement]:
        return [] if self.sizes == QUICK else report.goals_of(self.figures)

    def add_to(self, result: dict[str, Any]) -> dict[str, Any]:
        """The report of the migrations as JSON has it, with the dirty log's figures and goals."""
        goals = [*result["goals"], *(vars(one) for one in self._goals)]
        log = report.to_json(self.figures, self.missing, self.sizes) if self.figures else None
        if log is not None:
            log["host"] = self.host and vars(self.host)
        return result | {"dirty_log": log, "goals": goals}

    def print(self, console: Console) -> None:
        """Print them."""
        if self.figures or self.missing:
            report.print_report(console, self.figures, self.missing, self.sizes)
        print_goals(console, self._goals)
        if any(one.met is False for one in self._goals):
            console.print(f"dirty log: {self.host}", soft_wrap=True, highlight=False)


def find_modes(asked: Sequence[str]) -> Modes:
    """Try each: a VM is made.

    :raise HypervisorError: When one cannot be made though this host has it.
    """
    there, missing = [], {}
    arch = BOARDS.get(ACCELERATORS.get("kvm").board).isa
    for mode in dict.fromkeys(map(DirtyLogMode, asked)):
        try:
            open_vm("kvm", arch, dirty_log=mode).close()
            there.append(mode)
        except Unsupported as error:
            missing[mode.value] = str(error)
    return Modes(there, missing)
