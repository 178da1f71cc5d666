"""The loop: mutate, run, keep what is new, report what must not be."""

import random
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from tests.fuzz.mutate import Mutator
from tests.fuzz.parts import Parts
from tests.fuzz.targets import NUMBERS, TARGETS, Run, seeds

HANG_SECONDS = 120
GROWTH_BYTES = 400 << 20
"""More memory than any input may take; a survey holds 64 MiB of guest RAM, a description that of 250 times its size."""
_KEPT = 400
_WARM = 10


class Hang(Exception):
    """An input took too long."""


@dataclass
class Finding:
    """:ivar what: the exception and where it came from, a hang, or memory"""

    target: str
    what: str
    parts: Parts


@dataclass
class Result:
    """:ivar kept: inputs that made a decoder say something new
    :ivar grown_bytes: how much the process' greatest size grew while it ran
    """

    target: str
    seed: int
    count: int = 0
    seconds: float = 0.0
    kept: int = 0
    grown_bytes: int = 0
    findings: list[Finding] = field(default_factory=list)


def fuzz(
    target: str,
    corpus: Path,
    seed: int,
    *,
    count: int | None = None,
    seconds: float | None = None,
    watch: Callable[[Parts, Result], None] = lambda parts, result: None,
) -> Result:
    """Fuzz one target in this process, in the main thread.

    :param count: inputs at most
    :param seconds: time at most
    :param watch: called before each input runs
    """
    kind, run = TARGETS[target]
    rng = random.Random(f"{target} {seed}")
    pool = seeds(corpus, kind)
    mutator = Mutator(rng, list(pool))
    result = Result(target, seed)
    heard: set[str] = set()
    known: set[str] = set()
    size = _size()
    for parts in pool:
        # Kernels are compiled now, however long that takes; what else goes wrong will do so again.
        with suppress(Exception):
            run(parts, random.Random(0))
    started = time.monotonic()
    # First the recordings themselves.
    fresh = list(pool)
    while (count is None or result.count < count) and (
        seconds is None or time.monotonic() - started < seconds
    ):
        parts = fresh.pop() if fresh else mutator.mutate(rng.choice(pool))
        watch(parts, result)
        result.count += 1
        try:
            with _limited():
                text = run(parts, rng)
        except Exception as error:
            what = _where(error)
            if what not in known:
                known.add(what)
                result.findings.append(Finding(target, what, parts))
            continue
        if text not in heard:
            heard.add(text)
            result.kept += 1
            if len(pool) >= _KEPT:
                del pool[rng.randrange(len(pool))]
            pool.append(parts)
        grown = _size()
        if grown - size > GROWTH_BYTES and result.count > _WARM:
            result.findings.append(
                Finding(target, f"memory: {(grown - size) >> 20} MiB for one input", parts)
            )
        if result.count > _WARM:
            result.grown_bytes += grown - size
        size = grown
    result.seconds = time.monotonic() - started
    return result


def replay(target: str, parts: Parts, seed: int = 0) -> str:
    """Run one input.

    :raise Exception: What the target raises.
    """
    run: Run = TARGETS[target][1]
    return run(parts, random.Random(seed))


def _size() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _where(error: Exception) -> str:
    """An exception and the line it came from, which tell findings apart."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sterna/" in frame.filename or "/fuzz/" in frame.filename]
    place = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
    return f"{type(error).__name__} at {place}: {NUMBERS.sub('#', str(error))[:200]}"


@contextmanager
def _limited() -> Iterator[None]:
    def expired(number: int, frame: FrameType | None) -> None:
        raise Hang(f"an input ran for more than {HANG_SECONDS} s")

    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
