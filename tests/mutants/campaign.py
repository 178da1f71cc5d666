"""A sample of a folder's mutants, each judged by the tests that run its line; what was found is kept, and taken up again."""

import fcntl
import hashlib
import json
import queue
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from tests.mutants.callers import Callers
from tests.mutants.folders import Folder
from tests.mutants.points import Point, files_of, points_in
from tests.mutants.record import Recorded, digest_of, record, test_digest
from tests.mutants.tree import Tree

_LIMIT_S = 60.0
_LIMIT_FACTOR = 10.0
"""A test may take so many times what it took when it was recorded, and a minute more: the machine may be busy."""
_CONTROL_EVERY = 20
"""After so many mutants comes one that changes nothing: a test that fails then tells how far the others can be trusted."""
CONTROL = "control"


@dataclass(frozen=True)
class Judged:
    """What became of a mutant.

    :ivar name: of the mutant
    :ivar operator: what was changed
    :ivar killed: whether a test saw it
    :ivar how: see `Run`
    :ivar test: the test that did
    :ivar why: what it said
    :ivar line: in its file
    :ivar tests: that ran on it, at most
    :ivar seconds: the tests took
    :ivar source: digest of the sources
    :ivar judges: digest of that test and its file, or of all that had a say where none saw it
    """

    name: str
    operator: str
    killed: bool
    how: str
    test: str
    why: str
    line: int
    tests: int
    seconds: float
    source: str
    judges: str


@dataclass
class Score:
    """:ivar points: mutation points of the folder
    :ivar judged: the sample, each with what became of it
    :ivar controls: what became of those that change nothing
    """

    points: int
    judged: list[Judged] = field(default_factory=list)
    controls: list[Judged] = field(default_factory=list)

    @property
    def killed(self) -> int:
        return sum(one.killed for one in self.judged)

    @property
    def survivors(self) -> list[Judged]:
        return [one for one in self.judged if not one.killed]


def sample_of(points: Sequence[Point], seed: str, size: int) -> list[Point]:
    """So many of them, the same each time; a larger sample has the smaller one in it."""
    order = random.Random(seed).sample(range(len(points)), len(points))
    return [points[place] for place in order[:size]]


class InUse(Exception):
    """Another run works in the directory."""


class Campaign:
    """A context manager.

    :param root: the project's directory
    :param work: where copies of the tree, recordings and results are kept
    :param jobs: mutants at a time, each in a tree of its own
    :param longest_s: tests that take longer are left out
    :param say: takes progress
    :raise InUse: When another run works there.
    """

    def __init__(
        self,
        root: Path,
        work: Path,
        jobs: int = 1,
        longest_s: float = float("inf"),
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self._held = (work / "lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._held.close()
            raise InUse(f"{work} is used by another run") from None
        # What is judged is the project as it was when the run began, whatever is edited meanwhile.
        cache = work / "cache"
        self._root = Tree(root, work / "sound", cache).path
        self._work = work
        self._jobs = jobs
        self._longest_s = longest_s
        self._say = say
        self._lock = threading.Lock()
        self._trees: queue.Queue[Tree] = queue.Queue()
        for number in range(jobs):
            self._trees.put(Tree(self._root, work / f"tree-{number}", cache))
        self._callers = Callers(self._root)
        self._source = digest_of([*(self._root / "src").rglob("*.py")])

    def close(self) -> None:
        """Let another run have the directory."""
        self._held.close()

    def __enter__(self) -> "Campaign":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _tree(self) -> Iterator[Tree]:
        tree = self._trees.get()
        try:
            yield tree
        finally:
            self._trees.put(tree)

    def points(self, folder: Folder) -> list[Point]:
        """All mutation points of the folder."""
        files = files_of(self._root, folder.sources, tuple(folder.left_out))
        return [point for name in files for point in points_in(name, (self._root / name).read_bytes())]

    def judge(self, name: str, folder: Folder, size: int, seed: str) -> Score:
        """Judge a sample of a folder's mutants; those judged before, by what has not changed since, are not judged again."""
        with self._tree() as tree:
            recorded = record(tree, self._root, folder.tests, self._work / "recorded", self._say)
        failed = [test for test, outcome in recorded.unfit.items() if outcome == "failed"]
        self._say(f"{name}: {len(recorded.unfit) - len(failed)} tests are skipped here, and judge nothing")
        for test in failed:
            self._say(f"{name}: {test} failed on the sound sources, so it judges nothing")
        points = self.points(folder)
        results = self._work / f"{name}.jsonl"
        with results.open("a+b") as file:
            # The last line is half a line when a run was stopped as it wrote it.
            end = file.tell()
            file.seek(max(0, end - 1))
            if end and file.read() != b"\n":
                file.write(b"\n")
        before = {one.name: one for one in _read(results)}
        score = Score(len(points))
        chosen = sample_of(points, f"{seed} {name}", size)
        chosen += [replace(point, operator=CONTROL, after=point.before) for point in chosen[::_CONTROL_EVERY]]
        done = 0

        def one(point: Point) -> None:
            nonlocal done
            judged = before.get(point.name)
            if judged is None or not self._holds(judged, point, recorded):
                judged = self._judge(point, recorded, [*before.values(), *score.judged])
                with self._lock, results.open("a") as file:
                    file.write(json.dumps(asdict(judged)) + "\n")
            with self._lock:
                done += 1
                (score.controls if point.operator == CONTROL else score.judged).append(judged)
                word = f"killed by {judged.test or judged.how}" if judged.killed else "survived"
                self._say(f"{name} {done}/{len(chosen)}: {point.name}: {word}")

        with ThreadPoolExecutor(self._jobs) as pool:
            for _ in pool.map(one, chosen):
                pass
        return score

    def _judges(self, point: Point, recorded: Recorded) -> list[str]:
        """The tests that run what was changed, but those that take too long."""
        tests: set[str] = set()
        if point.runs:
            tests = recorded.tests_of(point.path, range(point.lines[0], point.lines[1] + 1))
        if not tests and point.defines:
            tests = self._callers.tests_of(point.defines, recorded)
        if not tests and not point.runs:
            tests = set().union(*recorded.lines.get(point.path, {}).values())
        return [test for test in tests if recorded.seconds[test] <= self._longest_s]

    def _digest(self, tests: Sequence[str]) -> str:
        """Of tests and the files that they are in."""
        files = {test.partition("::")[0] for test in tests}
        told = [*sorted(tests), *sorted(test_digest(self._root, self._root / file) for file in files)]
        return hashlib.sha256("\n".join(told).encode()).hexdigest()[:16]

    def _holds(self, judged: Judged, point: Point, recorded: Recorded) -> bool:
        """Whether what was found would be found again: the same sources, and the same tests as far as they had a say."""
        if judged.source != self._source:
            return False
        judges = [judged.test] if judged.test else self._judges(point, recorded)
        if any(not (self._root / test.partition("::")[0]).is_file() for test in judges):
            return False
        return judged.judges == self._digest(judges)

    def _judge(self, point: Point, recorded: Recorded, before: Iterable[Judged]) -> Judged:
        tests = self._judges(point, recorded)
        # Who saw another change to the same function comes first, then whoever is fastest.
        place = f"{point.path}: {point.where}: "
        proven = {one.test for one in before if one.killed and one.name.startswith(place)}
        tests.sort(key=lambda test: (test not in proven, recorded.seconds[test], test))
        judged = Judged(
            point.name, point.operator, False, "", "", "", point.lines[0], len(tests), 0.0, self._source, ""
        )
        if tests:
            source = (self._root / point.path).read_bytes()
            plan = [(test, _LIMIT_S + _LIMIT_FACTOR * recorded.seconds[test]) for test in tests]
            with self._tree() as tree, tree.changed(point.path, point.apply(source)):
                run = tree.run(plan)
            judged = replace(
                judged,
                killed=run.failed,
                how=run.how,
                test=run.test,
                why=run.why,
                seconds=round(run.seconds, 2),
            )
        return replace(judged, judges=self._digest([judged.test] if judged.test else tests))


def _read(results: Path) -> Iterator[Judged]:
    if results.is_file():
        for line in results.read_text().splitlines():
            try:
                yield Judged(**json.loads(line))
            except (ValueError, TypeError):
                continue
