"""Which tests run which lines, recorded once for each file of tests, and how long each takes."""

import hashlib
import json
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coverage import CoverageData
from tests.mutants.tree import Tree


@dataclass
class Recorded:
    """:ivar seconds: of each test that passed
    :ivar lines: the tests that ran each line, by path and line
    :ivar unfit: tests that failed or were skipped on the sound sources: they judge nothing
    """

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[int, set[str]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(set))
    )
    unfit: dict[str, str] = field(default_factory=dict)

    def tests_of(self, path: str, lines: range) -> set[str]:
        """The tests that ran one of these lines."""
        of_file = self.lines.get(path, {})
        return {test for line in lines for test in of_file.get(line, ())}


def digest_of(paths: Sequence[Path]) -> str:
    """A short digest of files, with their names."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        data = path.read_bytes()
        digest.update(f"{path.name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:16]


def test_files(root: Path, tests: Sequence[str]) -> Iterator[Path]:
    """The files of tests that these files and folders are, from the project's directory."""
    for name in tests:
        path = root / name
        yield from [path] if path.is_file() else sorted(path.rglob("test_*.py"))


def test_digest(root: Path, file: Path) -> str:
    """Digest of a file of tests and of what stands beside it for them."""
    beside = [path for path in file.parent.glob("*.py") if not path.name.startswith("test_")]
    above = [path / "conftest.py" for path in file.parent.parents if (path / "conftest.py").is_file()]
    return digest_of([file, *beside, *(path for path in above if path.is_relative_to(root))])


def _recorded_file(tree: Tree, test: str) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix="mutants-") as scratch:
        directory = Path(scratch)
        report = tree.record(test, directory)
        outcomes: dict[str, str] = {}
        for line in report:
            if "test" in line and outcomes.get(str(line["test"])) != "failed":
                outcomes[str(line["test"])] = str(line["outcome"])
        seconds = {str(line["ended"]): line["seconds"] for line in report if "ended" in line}
        ran: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
        for part in directory.glob("data.*"):
            data = CoverageData(str(part))
            data.read()
            for file in data.measured_files():
                name = Path(file).relative_to(tree.path.resolve()).as_posix()
                for number, contexts in data.contexts_by_lineno(file).items():
                    # "A|B": of the process, which inherits it as pytest writes it, and within the process.
                    tests = {
                        text.rpartition(" (")[0] or text
                        for context in contexts
                        for text in context.split("|")
                    }
                    ran[name][number] |= tests & seconds.keys()
    return {
        "seconds": {test: spent for test, spent in seconds.items() if outcomes.get(test) == "passed"},
        "unfit": {test: outcome for test, outcome in outcomes.items() if outcome != "passed"},
        "lines": {
            name: {line: sorted(tests) for line, tests in lines.items()} for name, lines in ran.items()
        },
    }


def record(
    tree: Tree, root: Path, tests: Sequence[str], kept: Path, say: Callable[[str], None] = lambda text: None
) -> Recorded:
    """Record these tests, or take what was recorded of the same tests and the same sources.

    :param root: the project's directory
    :param kept: the directory of what was recorded
    """
    kept.mkdir(parents=True, exist_ok=True)
    sources = digest_of([*(root / "src").rglob("*.py")])
    whole = Recorded()
    for file in test_files(root, tests):
        name = file.relative_to(root).as_posix()
        place = kept / f"{sources}-{test_digest(root, file)}.json"
        if not place.is_file():
            part = _recorded_file(tree, name)
            place.write_text(json.dumps(part))
            say(f"recorded {name}: {len(part['seconds'])} tests, {len(part['unfit'])} unfit")  # type: ignore[arg-type]
        read = json.loads(place.read_text())
        whole.seconds |= read["seconds"]
        whole.unfit |= read["unfit"]
        for path, lines in read["lines"].items():
            for number, found in lines.items():
                whole.lines[path][int(number)] |= whole.seconds.keys() & found
    return whole
