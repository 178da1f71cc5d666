"""The suite on a hypervisor that is not ours, as its developer runs it."""

import subprocess
import sys
from pathlib import Path

import pytest

import sterna

pytestmark = pytest.mark.slow

MODULE = """
from sterna.hypervisor.interface import DirtyLogMode
from sterna.testing import broken_vm
from sterna.testing.conformance.backends import EmulatedArmv7

class Sound(EmulatedArmv7):
    name = "mine"
    modes = (DirtyLogMode.BITMAP,)

class Forgetful(Sound):
    def make_vm(self, smp, mode, **options):
        return broken_vm("forget-mark")(smp, secondaries_off=False)

sound = Sound()
nothing = 1
"""


def suite(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    (folder / "mine.py").write_text(MODULE)
    plugin, package = "sterna.testing.conformance.plugin", "sterna.testing.conformance"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        plugin,
        "--pyargs",
        package,
    ]
    return subprocess.run(
        [*command, *arguments],
        cwd=folder,
        env={"PATH": "", "HOME": str(Path.home()), "PYTHONPATH": str(Path(sterna.__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.parametrize("backend", ["mine:Sound", "mine:sound"])
def test_a_sound_hypervisor_passes(backend: str, tmp_path: Path) -> None:
    done = suite(tmp_path, "--backend", backend, "-k", "exactly or reads_are")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 passed")


def test_a_hypervisor_with_a_fault_fails(tmp_path: Path) -> None:
    done = suite(tmp_path, "--backend", "mine:Forgetful", "-k", "exactly or reads_are")
    assert done.returncode == 1, done.stdout
    assert "FAILED" in done.stdout
    assert "test_exactly_the_pages_written[mine-bitmap]" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 failed, 1 passed")


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("mine:Nobody", "--backend mine:Nobody: module 'mine' has no attribute 'Nobody'"),
        ("nowhere:Sound", "--backend nowhere:Sound: No module named 'nowhere'"),
        ("mine:nothing", "--backend mine:nothing: this is no sterna.testing.Backend"),
    ],
)
def test_what_is_no_hypervisor_is_said(backend: str, message: str, tmp_path: Path) -> None:
    done = suite(tmp_path, "--backend", backend)
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert message in done.stdout + done.stderr
