"""The tool itself, on a project in small: what tests can see is found, what they cannot is not, and nothing is judged twice."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.mutants import campaign, tree
from tests.mutants.campaign import CONTROL, Campaign, InUse, Judged, Score, sample_of
from tests.mutants.folders import FOLDERS, Folder
from tests.mutants.known import read_known
from tests.mutants.points import files_of, points_in
from tests.mutants.tree import Tree

ROOT = Path(__file__).parent.parent.parent
TOY = Folder("src/toy", ("tests/toy",), {"src/toy/faults.py": "on purpose"})
SOURCES = {
    "pyproject.toml": '[tool.pytest.ini_options]\npythonpath = ["src", "tests"]\naddopts = "--import-mode=importlib"\n',
    "src/toy/__init__.py": "",
    "src/toy/faults.py": "ONE = 2\n",
    "src/toy/plain.py": """\
LIMIT = 7

def at_most(value: int) -> int:
    return value if value < LIMIT else LIMIT

def product(left: int, right: int) -> int:
    return left * right

def unseen(value: int) -> int:
    return -value
""",
    "src/toy/kernels.py": """\
from sterna.jit.kernel import kernel

@kernel()
def double(number: int) -> int:
    return number + number

@kernel()
def count_down(number: int) -> int:
    while number > 0:
        number -= 1
    return number
""",
    "src/toy/callers.py": """\
from sterna.jit.kernel import kernel
from toy.kernels import count_down, double

@kernel()
def quadruple(number: int) -> int:
    return double(double(number))

def landed(number: int) -> bool:
    return count_down(number) == 0
""",
    "tests/toy/test_toy.py": """\
import subprocess
import sys

import pytest

from toy.callers import landed, quadruple
from toy.plain import at_most

def test_at_most():
    assert [at_most(6), at_most(7), at_most(8)] == [6, 7, 7]

def test_in_a_process_of_its_own():
    assert subprocess.run([sys.executable, "-c", "from toy.plain import product; assert product(3, 4) == 12"]).returncode == 0

def test_quadruple():
    assert quadruple(3) == 12

@pytest.fixture
def lands():
    yield
    assert landed(3)

def test_landed(lands):
    pass

def test_fails_anyhow():
    assert at_most(0) == 1
""",
}


@pytest.fixture
def judge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Score]:
    """Judges all mutants of the toy, as a run of its own."""
    for name, text in SOURCES.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    shutil.copytree(
        ROOT / "tests" / "mutants", tmp_path / "tests" / "mutants", ignore=shutil.ignore_patterns("__*")
    )
    (tmp_path / "tests" / "mutants" / "__init__.py").touch()
    # What goes on for ever is waited for.
    monkeypatch.setattr(campaign, "_LIMIT_S", 10.0)

    def judge(longest_s: float = 600.0) -> Score:
        with Campaign(tmp_path, tmp_path / ".mutants", longest_s=longest_s) as made:
            with pytest.raises(InUse, match="is used by another run"):
                Campaign(tmp_path, tmp_path / ".mutants")
            return made.judge("toy", TOY, 1000, "seed")

    return judge


def _by_name(score: Score) -> dict[str, Judged]:
    return {one.name.removeprefix("src/toy/"): one for one in score.judged}


@pytest.mark.slow
def test_what_tests_can_see_is_killed_and_what_they_cannot_survives(
    judge: Callable[..., Score], tmp_path: Path
) -> None:
    # Without a test none is killed, and that is no longer so when there are some.
    assert judge(longest_s=-1.0).killed == 0
    score = judge()
    judged = _by_name(score)
    assert len(judged) == score.points
    assert {one.name: one.why for one in score.controls if one.killed} == {}
    assert [one.operator for one in score.controls] == [CONTROL]
    # Equal at the limit either way; and what no test runs.
    assert {one.name.removeprefix("src/toy/") for one in score.survivors} == {
        "plain.py: at_most: comparison: value < LIMIT => value <= LIMIT",
        "plain.py: unseen: arithmetic: -value => value",
        "plain.py: unseen: return: -value => (-value) + 1",
    }
    assert judged["plain.py: unseen: arithmetic: -value => value"].tests == 0
    assert judged["plain.py: LIMIT: constant: 7 => 8"].test == "tests/toy/test_toy.py::test_at_most"
    product = judged["plain.py: product: arithmetic: left * right => left // right"]
    assert (product.test, product.tests) == ("tests/toy/test_toy.py::test_in_a_process_of_its_own", 1)
    # Compiled into its caller, whose file is what it was.
    double = judged["kernels.py: double: arithmetic: number + number => number - number"]
    assert (double.test, double.tests) == ("tests/toy/test_toy.py::test_quadruple", 1)
    for_ever = judged["kernels.py: count_down: statement: number -= 1 => pass"]
    assert (for_ever.how, for_ever.test) == ("limit", "tests/toy/test_toy.py::test_landed")
    # The copy is sound again, and the project was never anything else.
    for name, text in SOURCES.items():
        assert (tmp_path / name).read_text() == text
        assert (tmp_path / ".mutants" / "tree-0" / name).read_text() == text

    # A second run judges nothing again, but where a test came that may see more.
    results = tmp_path / ".mutants" / "toy.jsonl"
    first = results.read_text()
    with results.open("a") as file:
        file.write(first[: len(first.splitlines()[0]) // 2])  # as a run that was killed left it
    assert sorted(judge().judged, key=str) == sorted(score.judged, key=str)
    assert results.read_text().startswith(first)
    assert len(results.read_text().splitlines()) == len(first.splitlines()) + 1
    (tmp_path / "tests" / "toy" / "test_more.py").write_text(
        "from toy.plain import unseen\n\n\ndef test_unseen():\n    assert unseen(3) == -3\n"
    )
    results.write_text(first)
    again = _by_name(judge())
    seen = {name for name in again if again[name] != judged[name]}
    assert seen == {name for name in again if name.startswith("plain.py: unseen")}
    assert {again[name].test for name in seen} == {"tests/toy/test_more.py::test_unseen"}
    assert len(results.read_text().splitlines()) == len(first.splitlines()) + len(seen)
    assert {json.loads(line)["killed"] for line in results.read_text().splitlines()[-len(seen) :]} == {True}


@pytest.mark.parametrize(
    ("body", "end"),
    [
        ("assert 1 == 2", ("test", "assert 1 == 2")),
        ("os._exit(1)", ("crash", "exit code 1")),
        ("os.kill(os.getpid(), 11)", ("crash", "exit code -11")),
        ("time.sleep(1000)", ("limit", "")),
        ("kept = []\n    while True: kept.append(b'x' * (1 << 26))", ("limit", "")),
        ("pass", ("", "")),
    ],
)
def test_how_a_run_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, end: tuple[str, str]
) -> None:
    (tmp_path / "tests" / "toy").mkdir(parents=True)
    (tmp_path / "pyproject.toml").write_text(SOURCES["pyproject.toml"])
    (tmp_path / "tests" / "toy" / "test_end.py").write_text(
        f"import os\nimport time\n\ndef test_before():\n    pass\n\ndef test_end():\n    {body}\n"
    )
    # Byte code comes and goes meanwhile.
    shutil.copytree(
        ROOT / "tests" / "mutants",
        tmp_path / "tests" / "mutants",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    monkeypatch.setattr(tree, "RESIDENT_BYTES", 1 << 29)
    test = "tests/toy/test_end.py::test_end"
    plan = [("tests/toy/test_end.py::test_before", 600.0), (test, 3.0 if "sleep" in body else 600.0)]
    run = Tree(tmp_path, tmp_path / "tree", tmp_path / "cache").run(plan)
    assert (run.how, run.failed) == (end[0], bool(end[0]))
    assert run.why.endswith(end[1])
    assert run.test == (test if run.failed else "")


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("a = b < c", {"b <= c"}),
        ("a = b is not c", {"b is c"}),
        ("a = (b) not in (c)", {"b) in (c"}),
        ("a = b and c or d", {"b or c", "b and c and d"}),
        ("a = b + c * d", {"b - c * d", "c // d"}),
        ("a = b << 3", {"b >> 3", "4"}),
        ("a = ~b & -1", {"~b | -1", "b", "1"}),
        ("a = f(b, c)", {"c, b"}),
        ("a = f(*b, c)", set()),
        ("a = f'{b + 1}' + 'c'", set()),
        ("a: int = True", {"False"}),
        ("a.b = c", {"pass"}),
        ("a |= c", {"pass", "a &= c"}),
        ("f()", {"pass"}),
        ("raise E(f'{b + 1}', 2)", {"pass"}),
        ("assert a == 1", set()),
        ("@d(1)\ndef f(a: B[1]) -> int:\n    'text'\n    return g(a)", {"(g(a)) + 1"}),
        ("def f() -> bool:\n    return a", {"not (a)"}),
        ("def f():\n    return a", {"None"}),
        ("if a:\n    b", {"not (a)"}),
        ("if not a:\n    b", {"a"}),
        ("if a == b:\n    c", {"a != b"}),
        ("while a < b:\n    break", {"not (a < b)", "a <= b", "pass"}),
        ("a = [b for b in c if b]", {"not (b)"}),
        ("# ä\na = (b +  # ä + ä\n  c)", {"b -  # ä + ä\n  c"}),
    ],
)
def test_points(source: str, changes: set[str]) -> None:
    points = points_in("file.py", source.encode())
    assert {point.after for point in points} == changes
    assert len({point.name for point in points}) == len(points)
    for point in points:
        compile(point.apply(source.encode()), "file.py", "exec")
        # Wherever the text stands, the mutant has the same name.
        assert point.name in {
            moved.name for moved in points_in("file.py", b"import x\n\n\n" + source.encode())
        }


def test_a_change_is_seen_in_the_lines_of_its_own() -> None:
    source = """\
def f(a, b):
    if (a <
            b):
        c(
            a, b)
    match a & 1:
        case 2:
            a.b = 3
        case a if a + 4:
            return g(
                a) * 5
    try:
        a.b = c
    except d[6]:
        pass
    while a == 7:
        a.b = c
"""
    points = points_in("file.py", source.encode())
    lines = {
        point.before: point.lines
        for point in points
        if point.operator in ("constant", "comparison", "arguments")
    }
    assert lines == {
        "a <\n            b": (2, 3),
        "a, b": (4, 5),
        "1": (6, 6),
        "2": (7, 7),
        "3": (8, 8),
        "4": (9, 9),
        "5": (10, 11),
        "6": (14, 14),
        "a == 7": (16, 16),
        "7": (16, 16),
    }
    assert {point.within for point in points} == {"f"}
    assert all(point.runs for point in points)


def test_a_larger_sample_has_the_smaller_one_in_it() -> None:
    points = points_in("file.py", b"a = b + c\n" * 50)
    assert sample_of(points, "seed", 20)[:10] == sample_of(points, "seed", 10)
    assert sample_of(points, "seed", 20) != sample_of(points, "other", 20)


def test_each_known_survivor_is_a_mutant_of_today() -> None:
    files = {
        name for folder in FOLDERS.values() for name in files_of(ROOT, folder.sources, tuple(folder.left_out))
    }
    names: dict[str, set[str]] = {}
    for mutant in read_known():
        path = mutant.partition(": ")[0]
        assert path in files, mutant
        if path not in names:
            names[path] = {point.name for point in points_in(path, (ROOT / path).read_bytes())}
        assert mutant in names[path], f"no such mutant any more: {mutant}"
