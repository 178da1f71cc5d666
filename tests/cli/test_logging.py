"""`-v` and `--log-file`: what commands tell of their work."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sterna.host import logs

log = logging.getLogger("sterna.cli")
Run = Callable[..., tuple[int, str, str]]


def tell() -> None:
    log.warning("a warning")
    log.info("an information")
    log.debug("a detail, %s", "\x1b[2J")


@pytest.mark.parametrize(
    ("verbosity", "told"),
    [
        (0, ["a warning"]),
        (1, ["a warning", "an information"]),
        (2, ["a warning", "an information", r"a detail, \x1b[2J"]),
        (9, ["a warning", "an information", r"a detail, \x1b[2J"]),
    ],
)
def test_how_much_is_told(
    verbosity: int, told: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "log"
    path.write_text("what was there\n")
    logs.start(verbosity, str(path))
    try:
        tell()
    finally:
        logs.stop()
    tell()
    assert [line.removeprefix("sterna: ") for line in capfd.readouterr().err.splitlines()][
        : len(told)
    ] == told
    first, *lines = path.read_text().splitlines()
    assert first == "what was there"
    assert [line.partition(" sterna.cli: ")[2] for line in lines] == [
        "a warning",
        "an information",
        r"a detail, \x1b[2J",
    ]
    assert all(f" {os.getpid()} MainThread " in line for line in lines)


class Keeper(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def test_another_may_tell_instead(capfd: pytest.CaptureFixture[str]) -> None:
    keeper = Keeper()
    logs.start(1, None)
    try:
        with logs.told_by(keeper):
            tell()
        assert capfd.readouterr().err == ""
        log.info("afterwards")
    finally:
        logs.stop()
    assert keeper.told == ["a warning", "an information"]
    assert capfd.readouterr().err == "sterna: afterwards\n"


def test_a_file_that_cannot_be_written(cli: Run, tmp_path: Path) -> None:
    code, _, err = cli("--log-file", str(tmp_path), "testbed", "list")
    assert (code, err) == (1, f"sterna: error: --log-file: cannot write {tmp_path}: Is a directory\n")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, _, err = cli("--log-file", str(pipe), "testbed", "list")
    assert (code, err) == (1, f"sterna: error: --log-file: cannot write {pipe}: No such device or address\n")


def test_without_them_nothing_is_set_up(cli: Run) -> None:
    cli("testbed", "list")
    assert logging.getLogger("sterna").level == logging.NOTSET
    assert logs.arguments() == []


@pytest.mark.slow
def test_a_demos_vms_write_to_the_same_file(tmp_path: Path) -> None:
    """And nothing of it is in the way of who reads the demo's output."""
    command = [sys.executable, "-m", "sterna", "-v", "--log-file", "log", "demo", "--json"]
    done = subprocess.run(
        [*command, "--kernel", "clock", "--memory", "16M"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verified"]
    told = done.stderr.splitlines()
    [source] = [line.rpartition(" ")[2] for line in told if line.startswith("sterna: the source is process ")]
    assert any(line.startswith("sterna: the source has ended with exit code ") for line in told)
    assert not any("query-migrate" in line for line in told)
    lines = [line.split(" ", 4) for line in (tmp_path / "log").read_text().splitlines()]
    assert any("to the source: migrate {" in line[-1] for line in lines)
    assert any(line[2] == source and "'status': 'completed'" in line[-1] for line in lines)
