"""How long a guest stood still, from what its CPUs have written of their counter on both sides."""

import numpy as np
import pytest

from sterna.guests.layout import (
    GAP_RECORDS,
    STATUS,
    STATUS_MAGIC,
    STATUS_VERSION,
    GuestState,
    ProgramId,
    Status,
    read_status,
)
from sterna.launch.guestview import GuestGap, migration_gap

HZ = 1_000_000_000
MS = HZ // 1000
LAST = 1000 * MS
"""The last reading at the source."""


def status(*cpus: tuple[int, list[tuple[int, int]]]) -> Status:
    """A status page: of each CPU its last reading, and the gaps above 5 ms since it started, as start and length."""
    page = np.zeros(1, dtype=STATUS)
    page["magic"], page["version"], page["program"] = STATUS_MAGIC, STATUS_VERSION, ProgramId.CLOCK
    page["state"], page["cpus"], page["frequency"] = GuestState.RUNNING, len(cpus), HZ
    page["long_gap_ticks"] = 5 * MS
    for number, (last, gaps) in enumerate(cpus):
        record = page["cpu"][0][number]
        record["last_counter"], record["long_gaps"] = last, len(gaps)
        for index, gap in enumerate(gaps):
            record["gaps"][index % GAP_RECORDS] = gap
        record["largest_gap_start"], record["largest_gap"] = max(
            gaps, key=lambda gap: gap[1], default=(0, 3 * MS)
        )
    return read_status(page.tobytes())


LATER = [(LAST + 500 * MS + 50 * number * MS, 20 * MS) for number in range(GAP_RECORDS)]
EARLIER = (100 * MS, 90 * MS)


@pytest.mark.parametrize(
    ("gaps", "expected"),
    [
        ([(LAST, 56 * MS)], GuestGap(56, True)),
        ([EARLIER, (LAST, 56 * MS)], GuestGap(56, True)),
        ([EARLIER, (LAST, 56 * MS), *LATER[1:]], GuestGap(56, True)),
        ([EARLIER], GuestGap(5, False)),
        ([EARLIER, *LATER], GuestGap(5, False)),
        ([(LAST, 56 * MS), *LATER], GuestGap(56, True)),
        ([EARLIER, (LAST, 56 * MS), *LATER], GuestGap(90, False)),
        ([EARLIER, (LAST + MS, 56 * MS)], GuestGap(56, False)),
        ([EARLIER, (LAST + 6 * MS, 56 * MS)], GuestGap(5, False)),
    ],
    ids=[
        *("largest", "not-largest", "not-the-latest", "none", "none-but-later-ones", "largest-but-older"),
        *("gone-from-the-record", "stopped-within-a-reading", "begun-too-late"),
    ],
)
def test_the_gap_of_one_cpu(gaps: list[tuple[int, int]], expected: GuestGap) -> None:
    before = [gap for gap in gaps if gap == EARLIER]
    assert migration_gap(status((LAST, before)), status((LAST + 2000 * MS, gaps))) == expected


def test_of_several_cpus_the_longest_counts_that_was_recorded() -> None:
    last = status((LAST, []), (LAST + MS, []), (0, []))
    now = LAST + 2000 * MS
    assert migration_gap(
        last, status((now, [(LAST, 30 * MS)]), (now, [(LAST + MS, 29 * MS)]), (0, []))
    ) == GuestGap(30, True)
    assert migration_gap(last, status((now, []), (now, [(LAST + MS, 29 * MS)]), (0, []))) == GuestGap(
        29, True
    )
    assert migration_gap(last, status((now, []), (now, [(LAST + 2 * MS, 29 * MS)]), (0, []))) == GuestGap(
        29, False
    )
