"""Running the command line."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import sterna
from sterna.cli import main
from sterna.cli.kernels import prepare_kernels, prepare_survey_kernels

Outcome = tuple[int, str, str]


@pytest.fixture(autouse=True)
def _same_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that a test starts run what the test has imported, installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(Path(sterna.__file__).parent.parent))


@pytest.fixture(autouse=True, scope="session")
def _compiled() -> None:
    """No process that a test starts says that it compiles kernels."""
    prepare_kernels()
    prepare_kernels("kvm")
    prepare_survey_kernels()


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> Outcome:
        with pytest.raises(SystemExit) as left:
            main(list(arguments))
        captured = capfd.readouterr()
        assert isinstance(left.value.code, int)
        return int(left.value.code), captured.out, captured.err

    return run


@pytest.fixture
def command_line() -> Callable[..., Outcome]:
    """The command line in a process of its own."""

    def run(*arguments: str, stdin: str = "") -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "sterna", *arguments],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        return done.returncode, done.stdout, done.stderr

    return run
