"""``python -m tests.handover``: migrations whose ends are killed and stopped, and whose connections are cut, at placed bytes.

At the same moment the listening address refuses, falls silent, or is somebody else's. Never may both ends run the guest.
"""

import argparse
import os
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from tests.handover.case import (
    CUTS,
    KILLS,
    STOPS,
    Case,
    Done,
    Ends,
    Verdict,
    a_second,
    draw,
    measure,
    run_case,
)
from tests.handover.relay import Address, Direction, Place
from tests.handover.vms import run_vms

_AT_A_TIME = 2


@dataclass
class Table:
    """How the cases ended, by what was done and what the address did."""

    first: Counter[tuple[Done, Address, Ends]] = field(default_factory=Counter)
    asked: Counter[tuple[Done, Address, Ends]] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: Case, verdict: Verdict) -> None:
        row = (case.done, case.address)
        self.first[*row, verdict.first] += 1
        if verdict.first is Ends.IN_DOUBT:
            self.asked[*row, verdict.last] += 1
        self.wrong += [f"{wrong}: {case}" for wrong in verdict.wrong]

    def __str__(self) -> str:
        asked = (Ends.SOURCE, Ends.DESTINATION, Ends.IN_DOUBT)
        names = ["source", "dest.", "in doubt", "both", "none", "->source", "->dest.", "stays"]
        lines = [f"{'what was done':18s}{'the address':17s}" + "".join(f"{name:>9s}" for name in names)]
        for done in Done:
            lines += [self._line(done.value, address.value, [(done, address)], asked) for address in Address]
        every = [(done, address) for done in Done for address in Address]
        lines.append(self._line("all", "", every, asked))
        return "\n".join(lines)

    def _line(
        self, done: str, address: str, rows: list[tuple[Done, Address]], asked: tuple[Ends, ...]
    ) -> str:
        figures = [sum(self.first[*row, ends] for row in rows) for ends in Ends]
        figures += [sum(self.asked[*row, ends] for row in rows) for ends in asked]
        return f"{done:18s}{address:17s}" + "".join(f"{figure or '.':>9}" for figure in figures)


def plan(options: argparse.Namespace) -> list[tuple[Case, bool]]:
    """The cases, and which are of real machines."""
    rng = random.Random(options.seed)
    with a_second() as second:
        lengths = measure(second)
    alone_too = os.geteuid() == 0
    counts = dict.fromkeys((*KILLS, Done.QUIT_DESTINATION), options.kills)
    for kinds, total in ((CUTS, options.cuts), (STOPS, options.stops)):
        counts |= {kind: total // len(kinds) + (at < total % len(kinds)) for at, kind in enumerate(kinds)}
    doubles = [
        (draw(rng, done, number, lengths, alone_too=alone_too), False)
        for done in Done
        for number in range(counts[done])
    ]
    real = [(_real(rng, number), True) for number in range(options.vms)]
    # The slow ones first, so that both workers end at the same time.
    return real + doubles


def _real(rng: random.Random, number: int) -> Case:
    """A case of real machines: each thing done in turn, half of them at the hand-over."""
    done = tuple(Done)[number % len(Done)]
    address = tuple(Address)[number % len(Address)]
    place = Place(Direction.FORWARD, rng.randrange(4 << 20))
    if (number // len(Done)) % 2 == 0:
        place = Place(Direction.AFTER_READY, rng.randrange(81))
    return Case(done, address, place, unix=address is Address.GONE)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.handover", description=__doc__)
    parser.add_argument("--kills", type=int, default=100, help="of each side, and quits of the destination")
    parser.add_argument("--cuts", type=int, default=200, help="of the connection, in four ways")
    parser.add_argument("--stops", type=int, default=50, help="of both sides together")
    parser.add_argument("--vms", type=int, default=16, help="cases more with real machines")
    parser.add_argument("--seed", type=int, default=1, help="of the places")
    options = parser.parse_args()
    started = time.monotonic()
    cases = plan(options)
    table = Table()
    with a_second() as second, ThreadPoolExecutor(_AT_A_TIME) as pool:
        runs: dict[bool, Callable[[Case], Verdict]] = {
            False: partial(run_case, second=second),
            True: partial(run_vms, second=second),
        }
        futures = [(case, pool.submit(runs[real], case)) for case, real in cases]
        for number, (case, future) in enumerate(futures, 1):
            try:
                table.add(case, future.result())
            except Exception:
                table.wrong.append(f"{traceback.format_exc()}: {case}")
            if sys.stderr.isatty():
                print(f"\r{number} of {len(cases)}", end="", file=sys.stderr)
    print(table)
    alone = sum(case.alone for case, _ in cases)
    print(
        f"\n{len(cases)} migrations, {sum(real for _, real in cases)} of real machines, {alone} to a PID namespace of its own; "
        f"seed {options.seed}, {time.monotonic() - started:.0f} s"
    )
    if os.geteuid() != 0:
        print("not root: no PID namespaces")
    for wrong in table.wrong:
        print(f"WRONG: {wrong}")
    print("never two" if not table.wrong else f"{len(table.wrong)} wrong")
    return 1 if table.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
