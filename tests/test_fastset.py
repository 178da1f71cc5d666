"""The guard of the fast set."""

import os
import subprocess
import sys
from pathlib import Path

from tests.fastset import NEEDS
from tests.test_layout import PROJECT, ROOT

TESTS = """
import ctypes, os, subprocess
import pytest

@pytest.fixture
def qemu(): ...

def test_nothing(): ...
def test_kvm():
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR))
    except OSError:
        pass
def test_qemu(tmp_path):
    (tmp_path / "qemu-system-none").symlink_to("/bin/true")
    subprocess.run([tmp_path / "qemu-system-none"])
def test_accelerator(): subprocess.run(["true", "--accel", "kvm"])
def test_namespace(): ctypes.CDLL(None).unshare
def test_program(): subprocess.run("unshare --help", shell=True); subprocess.run(["unshare", "--help"])
def test_by_fixture(qemu): ...
@pytest.mark.slow
def test_by_marker(): ...
@pytest.mark.parametrize("accel", ["emulated", "kvm"])
def test_by_parameter(accel): ...
"""
OPTIONS = ("-q", "-p", "no:cacheprovider", "-p", "tests.fastset")


def run(folder: Path, *options: str) -> list[str]:
    """What pytest says of the tests above, line by line."""
    (folder / "test_some.py").write_text(TESTS)
    markers = "\n".join(f"    {name}" for name in NEEDS)
    (folder / "pytest.ini").write_text(f"[pytest]\naddopts = --strict-markers\nmarkers =\n{markers}\n")
    command = [sys.executable, "-m", "pytest", *OPTIONS, "--rootdir", str(folder), str(folder), *options]
    return subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"COLUMNS": "300", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    ).stdout.splitlines()


def test_what_the_fast_set_may_not_do_fails(tmp_path: Path) -> None:
    *said, summary = run(tmp_path, "--fast")
    failed = {line.partition("::")[2] for line in said if line.startswith("ERROR ")}
    assert failed == {
        f"test_{name} - Failed: a test of the fast set {what}: give it its marker, one of {', '.join(NEEDS)}"
        for name, what in {
            "kvm": "opens /dev/kvm",
            "qemu": "runs qemu-system-none",
            "accelerator": "runs a program with kvm as its argument",
            "namespace": "calls unshare",
            "program": "runs unshare",
        }.items()
    }
    assert summary.startswith("7 passed, 3 deselected, 5 errors")


def test_without_it_all_run(tmp_path: Path) -> None:
    assert run(tmp_path)[-1].startswith("10 passed")


def test_fixtures_and_parameters_give_markers(tmp_path: Path) -> None:
    assert run(tmp_path, "-m", "qemu or kvm and not root")[-1].startswith("2 passed, 8 deselected")


def test_its_markers_are_all_that_there_are() -> None:
    markers = PROJECT["tool"]["pytest"]["ini_options"]["markers"]
    assert sorted(text.partition(":")[0] for text in markers) == sorted(NEEDS)
