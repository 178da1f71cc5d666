"""Debian packages and Python wheels for arm64, fetched by apt and pip without touching this machine's own."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sterna.host.pythonprogram import module_command
from sterna.testbed.armhost.recipe import (
    DEBIAN_PACKAGES,
    KERNELS,
    LEFT_OUT,
    PYTHON_VERSION,
    WHEEL_PLATFORMS,
)
from sterna.testbed.debian.apt import Apt, run

_ARCHITECTURE = "arm64"


@dataclass(frozen=True)
class Packages:
    """Everything that the root file system is made of, on disk.

    :ivar debs: Debian packages
    :ivar wheels: Python wheels
    """

    debs: tuple[Path, ...]
    wheels: tuple[Path, ...]

    @property
    def names(self) -> list[str]:
        """The files' names, which hold the versions."""
        return sorted(path.name for path in (*self.debs, *self.wheels))


def fetch(python_packages: Sequence[str], directory: Path) -> Packages:
    """Resolve and download into `directory`, where earlier downloads are reused.

    :raise ImageError: When a tool is missing or a download fails.
    """
    debs = Apt(directory / "apt", _ARCHITECTURE).packages(DEBIAN_PACKAGES, left_out=LEFT_OUT)
    return Packages(debs, _fetch_wheels(python_packages, directory / "wheels"))


def fetch_kernel(kernel: str, directory: Path) -> Path:
    """The package of a kernel, by key of `KERNELS`; as `fetch`."""
    return Apt(directory / "apt", _ARCHITECTURE, KERNELS[kernel]).kernel("linux-image-arm64")


def _fetch_wheels(wanted: Sequence[str], directory: Path) -> tuple[Path, ...]:
    # Resolved anew, into an empty folder; pip keeps what it downloaded in a cache of its own.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    platforms = [part for platform in WHEEL_PLATFORMS for part in ("--platform", platform)]
    python = ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    pip = module_command("pip", "--disable-pip-version-check", "download")
    run(
        [*pip, "--dest", str(directory), *python, *platforms, "--only-binary=:all:", *wanted],
        "wheels for arm64",
    )
    return tuple(sorted(directory.glob("*.whl")))
