"""The date loop on the console."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sterna.launch.console import Line
from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence
from sterna.testbed.settings import Milliseconds

_LINE = re.compile(
    r"clock: (?P<hours>\d+):(?P<minutes>\d\d):(?P<seconds>\d\d)\.(?P<ms>\d{3}) seq (?P<sequence>\d+)",
    re.ASCII,
)


@dataclass(frozen=True)
class Tick:
    """One line of the `clock` program.

    :ivar guest_ms: the time it tells
    :ivar arrived_ms: when it came, by this machine's clock
    """

    sequence: int
    guest_ms: float
    arrived_ms: float


def ticks_of(lines: Sequence[Line]) -> tuple[list[Tick], list[str]]:
    """The lines of `clock`, and those that are none."""
    ticks, strange = [], []
    for line in lines:
        match = _LINE.match(line.text)
        if match is None:
            strange.append(line.text)
            continue
        hours, minutes, seconds, ms, sequence = (int(group) for group in match.groups())
        told = ((hours * 60 + minutes) * 60 + seconds) * 1000 + ms
        ticks.append(Tick(sequence, told, line.arrived * 1000))
    return ticks, strange


class ConsoleCheck(BaseCheck, tag="console", frozen=True):
    """The clock's lines go on across the migration: no gap beyond downtime and one period, no step back, none lost.

    :ivar period_ms: between lines
    :ivar slack_ms: what a gap may be longer, beyond what this machine keeps a guest waiting anyway
    """

    period_ms: Milliseconds
    slack_ms: Milliseconds = 50.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = (
        "the date loop goes on: no gap beyond downtime and a period, no step back, no lost line"
    )

    def judge(self, evidence: Evidence) -> Finding:
        problems: list[str] = []
        count, longest, allowed_most, most_seen = 0, 0.0, 0.0, 0.0
        for guest, lines in evidence.lines.items():
            ticks, strange = ticks_of(lines)
            if not ticks:
                problems.append(f"{guest}: its console shows no clock")
                continue
            own = [record for record in evidence.passages if record.guest == guest and record.completed]
            downtime = max((record.downtime_ms for record in own), default=0.0)
            jitter = max((record.jitter_ms for record in own), default=0.0)
            allowed = downtime + self.period_ms + self.slack_ms + jitter
            allowed_most = max(allowed, allowed_most)
            problems += [f"{guest}: not a line of the clock: {text[:80]!r}" for text in strange]
            for before, after in itertools.pairwise(ticks):
                gap = after.guest_ms - before.guest_ms
                longest = max(longest, gap)
                most_seen = max(most_seen, after.arrived_ms - before.arrived_ms)
                where = f"{guest}: line {after.sequence}"
                if after.sequence != before.sequence + 1:
                    problems.append(f"{where} comes after line {before.sequence}")
                if gap < 0:
                    problems.append(f"{where} is {-gap:.0f} ms before the one before it")
                elif gap > allowed:
                    problems.append(
                        f"{where} is {gap:.0f} ms after the one before it; {allowed:.0f} ms is the most"
                    )
            count += len(ticks)
        if not count and not problems:
            return self.skipped("no console was recorded")
        values = {
            "lines": count,
            "longest_gap_ms": longest,
            "allowed_ms": allowed_most,
            "silence_ms": most_seen,
        }
        figure = (
            f"{count} lines, longest gap {longest:.0f} ms by the guest, {most_seen:.0f} ms on the line; "
            f"{allowed_most:.0f} ms allowed"
        )
        return self.found(figure, problems, values)
