"""Property tests: the same examples in every run of the suite, others in the search."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
DRAWS = """
from hypothesis import given, settings, strategies as st

@settings(max_examples=5)
@given(st.integers(0, 1 << 60))
def test_draw(number):
    with open("drawn", "a") as file:
        file.write(f"{number} ")
"""
FAILS = """
from hypothesis import given, strategies as st

@given(st.integers())
def test_fail(number):
    assert number < 1000
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project with this suite's settings, and nothing else."""
    (tmp_path / "conftest.py").write_text((TESTS / "conftest.py").read_text())
    return tmp_path


def run(project: Path, *arguments: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(TESTS.parent), "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("ci", [False, True])
def test_the_suite_draws_the_same_examples_and_the_search_draws_others(
    project: Path, ci: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "GITHUB_ACTIONS"):
        monkeypatch.delenv(name, raising=False)
    if ci:
        monkeypatch.setenv("CI", "true")
    (project / "test_draws.py").write_text(DRAWS)
    drawn = []
    for command in (["pytest"], ["pytest"], ["tests.fuzz.properties", "--minutes", "0"]):
        code, said = run(project, *command)
        assert code == 0, said
        drawn.append((project / "drawn").read_text())
        (project / "drawn").unlink()
    assert drawn[0] == drawn[1]
    assert drawn[2] != drawn[0]


def test_the_search_goes_on_until_its_time_is_over(project: Path) -> None:
    (project / "test_draws.py").write_text(DRAWS)
    code, said = run(project, "tests.fuzz.properties", "--minutes", "0.05")
    assert code == 0, said
    assert re.search(r"^\d+ rounds of the property tests, none failed$", said, re.MULTILINE), said


def test_a_property_that_fails_ends_the_search_and_is_told(project: Path) -> None:
    (project / "test_fails.py").write_text(FAILS)
    code, said = run(project, "tests.fuzz.properties", "--minutes", "60")
    assert code == 1, said
    assert "1 rounds of the property tests, the last of them failed" in said
    assert "number=1000" in said


def test_no_example_is_remembered_in_the_suite(project: Path) -> None:
    (project / "test_fails.py").write_text(FAILS)
    code, said = run(project, "pytest")
    assert code == 1, said
    assert not (project / ".hypothesis/examples").exists()
