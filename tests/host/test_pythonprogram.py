"""Programs in Python that are started."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.refusal import Refusal, refusing

import sterna
from sterna.bench.ceiling import measure_ceiling
from sterna.bench.errors import BenchError
from sterna.host.pythonprogram import own_environment
from sterna.launch.process import SternaProcess
from sterna.testbed.armhost.packages import _fetch_wheels

pytestmark = pytest.mark.slow

SOURCES = Path(sterna.__file__).resolve().parent.parent


def start_a_machine(directory: Path) -> None:
    with SternaProcess("vm", ["--memory", "16M", "--kernel", "clock", "--paused"]) as vm:
        vm.ready()


def measure_the_ceiling(directory: Path) -> None:
    measure_ceiling(1 << 16, 1, lambda: None)


def fetch_wheels(directory: Path) -> None:
    _fetch_wheels(("--help",), directory / "wheels")


@pytest.mark.parametrize(
    ("start", "modules"),
    [
        (start_a_machine, ("click", "msgspec")),
        (measure_the_ceiling, ("numpy", "threading")),
        (fetch_wheels, ("pip",)),
    ],
)
def test_modules_of_the_directory_that_the_user_is_in_are_not_run(
    start: Callable[[Path], None],
    modules: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here, mark = tmp_path / "here", tmp_path / "mark"
    here.mkdir()
    for module in modules:
        (here / f"{module}.py").write_text(f"open({str(mark)!r}, 'a').write(f'{{__file__}}\\n')\n")
    monkeypatch.chdir(here)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    try:
        start(tmp_path)
    finally:
        assert not mark.exists(), mark.read_text()


@pytest.mark.parametrize("before", ["", "/elsewhere"])
def test_their_sterna_is_this_one(before: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", before)
    # -S: what is installed is not found.
    command = [
        sys.executable,
        "-P",
        "-S",
        "-c",
        "import sterna, sys; print(sterna.__file__, *sys.path[:3], sep='\\n')",
    ]
    done = subprocess.run(command, env=own_environment(), capture_output=True, text=True, check=True)
    file, *path = done.stdout.splitlines()
    assert Path(file) == SOURCES / "sterna" / "__init__.py"
    assert path[: 1 + bool(before)] == [str(SOURCES), *filter(None, [before])]


def test_one_that_cannot_be_started_is_an_error_of_one_line() -> None:
    with pytest.raises(BenchError, match=r"no process can be started: Resource temporarily unavailable"):
        refusing(Refusal("clone", errno.EAGAIN), lambda: measure_ceiling(1 << 16, 1, lambda: None))
