"""Runs of scenarios with each fault, and of sound migrations: how many were found, how many were false alarms."""

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from tests.detection.zygote import ForkedKind, Zygote

from sterna.testbed import scenario
from sterna.testbed.checks import CheckVerdict
from sterna.testbed.runner import Result, ScenarioOutcome, run_scenario

DETECTORS = {
    "skip-tlb-flush": ("checksum", "audit"),
    "forget-mark": ("checksum", "audit"),
    "clear-after-copy": ("checksum", "audit"),
    "protect-short": ("checksum", "audit"),
    "drop-last-pass": ("checksum", "audit"),
    "forget-counter-offset": ("timer", "clocks"),
    "no-rebuild": ("cancel", "huge-pages"),
}
"""What is broken, the scenario that has to find it, and its check."""
IN_A_ROW = 20
"""Sound migrations of one guest, from host to host."""
_LANES = 3
"""Runs at a time: they wait a good deal for their VMs."""


@dataclass(frozen=True)
class Way:
    """How a fault is looked for.

    :ivar lanes: runs at a time
    :ivar busy: loops that take the processors beside them
    """

    name: str
    reduced: bool = True
    lanes: int = _LANES
    busy: int = 0


WAYS = (Way("reduced"), Way("full", reduced=False, lanes=2), Way("busy", lanes=1, busy=2))


@dataclass
class Score:
    """:ivar hits: what was counted
    :ivar total: of how many
    :ivar seconds: that the runs took, all together
    :ivar told: of what should not have been, one line each
    """

    hits: int
    total: int
    seconds: float
    told: list[str]


def _spin(ended: "multiprocessing.synchronize.Event") -> None:
    while not ended.is_set():
        for _ in range(100_000):
            pass


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """So many processes that do nothing, as fast as they can."""
    context = multiprocessing.get_context("spawn")
    ended = context.Event()
    loops = [context.Process(target=_spin, args=(ended,), daemon=True) for _ in range(count)]
    for loop in loops:
        loop.start()
    try:
        yield
    finally:
        ended.set()
        for loop in loops:
            loop.join()


class Campaign:
    """:param zygote: makes the VMs
    :param say: takes progress
    """

    def __init__(self, zygote: Zygote, say: Callable[[str], None] = lambda text: None) -> None:
        self._zygote = zygote
        self._say = say
        self._lock = threading.Lock()

    def detect(self, breakage: str, way: Way, runs: int) -> Score:
        """Run its scenario so often: how many runs found the fault."""
        name, check = DETECTORS[breakage]
        file = scenario.find(name)
        kind = ForkedKind(self._zygote, "emulated", breakage)
        score = Score(0, runs, 0.0, [])

        def run(number: int) -> None:
            result = run_scenario(file, kind, reduced=way.reduced)
            verdicts = {finding.check: finding.verdict for finding in result.findings}
            found = result.outcome is ScenarioOutcome.FAILED and verdicts[check] is CheckVerdict.FAILED
            with self._lock:
                score.hits += found
                score.seconds += result.seconds
                if not found:
                    score.told.append(f"{breakage}, {way.name} run {number}: {_describe(result)}")

        self._run_all(run, runs, way.lanes, way.busy)
        self._say(f"{breakage}, {way.name}: {score.hits} of {runs} found")
        return score

    def sound(self, accel: str, migrations: int) -> Score:
        """Migrate sound guests so often, audited: how many had an alarm."""
        file = scenario.find("checksum")
        kind = ForkedKind(self._zygote, accel)
        score = Score(0, migrations, 0.0, [])
        runs = -(-migrations // IN_A_ROW)

        def run(number: int) -> None:
            times = min(IN_A_ROW, migrations - number * IN_A_ROW)
            tables = dict(file.tables) | {"procedure": {**file.tables["procedure"], "times": times}}
            result = run_scenario(replace(file, tables=tables), kind, reduced=True)
            audited = [record for record in result.evidence.passages if record.completed]
            sound = result.outcome is ScenarioOutcome.PASSED and len(audited) == times
            with self._lock:
                score.seconds += result.seconds
                if not sound:
                    score.hits += 1
                    score.told.append(f"sound on {accel}, run {number}: {_describe(result)}")

        self._run_all(run, runs, _LANES, 0)
        self._say(f"sound on {accel}: {score.hits} alarms in {migrations} migrations")
        return score

    @staticmethod
    def _run_all(run: Callable[[int], None], runs: int, lanes: int, busy: int) -> None:
        with busy_loops(busy), ThreadPoolExecutor(lanes) as pool:
            for _ in pool.map(run, range(runs)):
                pass


def _describe(result: Result) -> str:
    problems = [problem for finding in result.findings for problem in finding.problems]
    return f"{result.outcome.value} {result.reason} {'; '.join(problems[:4])}".strip()


def timed(seconds: float, runs: int) -> str:
    """How long one took."""
    return f"{seconds / runs:.1f} s each" if runs else "not run"


def stopwatch() -> Callable[[], float]:
    """Seconds since this was called."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
