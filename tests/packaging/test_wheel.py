"""Sterna as it is installed: a wheel, without a checkout around it."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.test_layout import NOT_INSTALLED, PACKAGE, ROOT

from sterna.testbed.armhost.recipe import recipe_for

pytestmark = pytest.mark.slow

PARTS = ("pyproject.toml", "README.md", "LICENSE")
OWN_RECIPE = """
from sterna.cli.testbedhost import _own_tree
from sterna.testbed.armhost.recipe import recipe_for
print(_own_tree(), recipe_for(_own_tree(), "backports"), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: setuptools writes beside what it builds."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "src", copy / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", *options, str(copy)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    [built] = out.glob("sterna-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for Python to look in that has what pip would put there."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def python(installed: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-P", *arguments],
        cwd=installed.parent,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_it_has_all_of_the_package_and_nothing_else(wheel: Path) -> None:
    ours = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*") if path.is_file()}
    ours = {name for name in ours if "__pycache__" not in name} - NOT_INSTALLED
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert packed == {f"sterna/{name}" for name in ours}


@pytest.mark.parametrize("command", [["--help"], ["testbed", "host", "--help"], ["testbed", "list"]])
def test_commands_run(installed: Path, command: list[str]) -> None:
    done = python(installed, "-m", "sterna", *command)
    assert (done.returncode, done.stderr) == (0, "")


def test_its_arm64_host_is_that_of_a_checkout(installed: Path) -> None:
    done = python(installed, "-c", OWN_RECIPE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [str(installed / "sterna"), str(recipe_for(ROOT, "backports"))]


def test_where_nothing_tells_what_it_needs_there_is_no_host(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(installed / "sterna", tmp_path / "nothing")
    arguments = ["testbed", "host", "arm64", "--tree", str(tmp_path / "nothing"), "true"]
    done = python(installed, "-m", "sterna", *arguments)
    assert done.returncode == 1
    assert done.stderr == (
        f"sterna: error: {tmp_path}/nothing is neither in a checkout of sterna nor installed: give a checkout with --tree\n"
    )
