"""What plots are made of, taken from the evidence of a run, whichever kind of VM gave it."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from sterna.memory.address import PAGE_SIZE
from sterna.testbed.evidence import MigrationRecord, ProgressSample

DOWNTIME_PARTS = {
    "stop": "devices stopped",
    "last-pass": "last pages",
    "device-state": "device state",
    "digest": "digest",
    "destination-load": "destination loads",
    "start": "start",
}
"""The parts of a downtime as query-migrate names them, in their order, and how people call them."""


@dataclass(frozen=True)
class PassFigures:
    """One pass of a migration.

    :ivar began: seconds since the first pass began
    :ivar due: bytes of RAM that were to be sent when it began
    :ivar done: bytes of RAM that it dealt with
    :ivar sent: bytes of the stream that they took
    :ivar dirtied: bytes of RAM found dirty at its end; None when nobody told
    """

    number: int
    began: float
    seconds: float
    due: int
    done: int
    sent: int
    dirtied: int | None

    @property
    def page_rate(self) -> float:
        """Bytes of RAM per second."""
        return self.done / self.seconds if self.seconds else 0.0

    @property
    def bandwidth(self) -> float:
        """Bytes of the stream per second."""
        return self.sent / self.seconds if self.seconds else 0.0

    @property
    def dirty_rate(self) -> float | None:
        """Bytes of RAM per second."""
        return None if self.dirtied is None or not self.seconds else self.dirtied / self.seconds


def passes(record: MigrationRecord) -> list[PassFigures]:
    """The passes, as the source counted them; from what was seen from outside where it does not tell."""
    told = record.info.get("x-sterna", {}).get("passes", [])
    if not told:
        return _passes_seen(record.moments)
    found: list[PassFigures] = []
    began = 0.0
    count = int(record.info.get("ram", {}).get("dirty-sync-count", len(told)))
    for number, row in enumerate(told, max(1, count - len(told) + 1)):
        seconds = float(row["ms"]) / 1000
        last = number == count and record.completed
        found.append(
            PassFigures(
                number,
                began,
                seconds,
                int(row["pages"]) * PAGE_SIZE,
                int(row["pages"]) * PAGE_SIZE,
                int(row["bytes"]),
                None if last else int(row["dirty_pages_after"]) * PAGE_SIZE,
            )
        )
        began += seconds
    return found


def _passes_seen(samples: Sequence[ProgressSample]) -> list[PassFigures]:
    """What samples of query-migrate tell of each pass; passes shorter than the time between samples are not seen."""
    found = []
    groups = [
        (number, list(group))
        for number, group in itertools.groupby(
            (sample for sample in samples if sample.pass_number), key=lambda sample: sample.pass_number
        )
    ]
    if not groups:
        return []
    zero = groups[0][1][0].at
    for (number, group), (_, following) in itertools.pairwise([*groups, (0, groups[-1][1][-1:])]):
        begin, end = group[0], following[0]
        seconds = end.at - begin.at
        if seconds <= 0:
            continue
        rate = next((sample.dirty_pages_rate for sample in following if sample.dirty_pages_rate), None)
        dirtied = None if rate is None else round(rate * PAGE_SIZE * seconds)
        sent = end.transferred - begin.transferred
        left = end.remaining if end is group[-1] else 0
        done = max(0, begin.remaining - left)
        found.append(PassFigures(number, begin.at - zero, seconds, begin.remaining, done, sent, dirtied))
    return found


def remaining(record: MigrationRecord) -> list[tuple[float, float]]:
    """Seconds since the first pass began, and bytes of RAM still to be sent."""
    if record.info.get("x-sterna", {}).get("passes"):
        # From exact times: each pass sends what was due when it began, and what it finds at its end is due in the next.
        points: list[tuple[float, float]] = []
        for one in passes(record):
            points += [(one.began, float(one.due)), (one.began + one.seconds, 0.0)]
        return points
    seen = [sample for sample in record.moments if sample.pass_number]
    return [(sample.at - seen[0].at, float(sample.remaining)) for sample in seen]


def downtime_parts(record: MigrationRecord) -> dict[str, float]:
    """The parts of the downtime in ms, by the names people know; empty when the VM does not tell."""
    told = record.info.get("x-sterna", {}).get("downtime-parts", {})
    return {label: float(told[name]) for name, label in DOWNTIME_PARTS.items() if name in told}
