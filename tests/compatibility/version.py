"""Earlier versions of sterna, from the repository's own history."""

import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from sterna.host.pythonprogram import module_command
from sterna.launch.process import SternaProcess

ROOT = Path(__file__).parents[2]
COMMITS = {"0.1.0": "b08cbba6feaa5198859ce4cf970dec981f0070cd"}
"""The last commit of each version."""
_KEPT = ROOT / ".versions"


class Missing(Exception):
    """A version cannot be had here; the text says why."""


def sources(version: str) -> Path:
    """A version's `src`. It stays in the checkout, at one place: kernels that it has compiled are found again by path.

    :raise Missing: When this is no clone, or one without its history.
    """
    commit = COMMITS[version]
    kept = _KEPT / commit
    if not kept.is_dir():
        _KEPT.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_KEPT) as name:
            _extract(version, commit, Path(name))
            try:
                os.rename(Path(name, "src"), kept)
            except OSError:
                if not kept.is_dir():  # else another process of the tests was first, and its copy is as good
                    raise
    return kept


def _extract(version: str, commit: str, directory: Path) -> None:
    archive = directory / "src.tar"
    command = ["git", "-C", str(ROOT), "archive", "--output", str(archive), commit, "src"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Missing("git is not installed") from error
    if done.returncode:
        raise Missing(f"no {version} in this clone's history ({commit[:7]}): {done.stderr.strip()}")
    subprocess.run(["tar", "-x", "-f", archive, "-C", directory], check=True)


class VersionVm(SternaProcess):
    """A `sterna run` of another version.

    :param source: its `src`
    """

    def __init__(self, name: str, arguments: Sequence[str], source: Path) -> None:
        self._source = source
        super().__init__(name, arguments)

    def _environment(self) -> Mapping[str, str]:
        return environment(self._source)


def environment(source: Path) -> Mapping[str, str]:
    """Of programs of a version."""
    return os.environ | {"PYTHONPATH": str(source)}


def program(source: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """A command of a version, at its end."""
    return subprocess.run(
        module_command("sterna", *arguments),
        env=environment(source),
        capture_output=True,
        text=True,
        check=False,
    )
