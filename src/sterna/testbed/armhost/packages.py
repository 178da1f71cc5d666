"""Debian packages and Python wheels for arm64, fetched by apt and pip without touching this machine's own.

apt works in a directory of its own, with an empty package status: it resolves what the packages need for a fresh arm64
system, checks signatures with Debian's keyring, and only downloads.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sterna.testbed.armhost.errors import ArmHostError
from sterna.testbed.armhost.recipe import (
    DEBIAN_PACKAGES,
    KERNELS,
    LEFT_OUT,
    MIRROR,
    PYTHON_VERSION,
    SUITE,
    WHEEL_PLATFORMS,
    Recipe,
)

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_KERNEL = re.compile(r"linux-image-\d\S*-arm64\b")
# 'URI' FILE SIZE HASH, as apt-get --print-uris has it.
_URI_LINE = re.compile(r"^'[^']*' (?P<file>\S+) \d+ (?P<hash>\S+)$")
_FOLDERS = (
    *("etc/preferences.d", "etc/sources.list.d", "etc/apt.conf.d", "etc/trusted.gpg.d"),
    *("state/lists/partial", "no-archives/partial"),
)
_TIMEOUT_S = 600
_MESSAGE_LINES = 4


@dataclass(frozen=True)
class Packages:
    """Everything that an image is made of, on disk.

    :ivar debs: Debian packages, the kernel's apart
    :ivar wheels: Python wheels
    """

    kernel: Path
    debs: tuple[Path, ...]
    wheels: tuple[Path, ...]

    @property
    def names(self) -> list[str]:
        """The files' names, which hold the versions."""
        return sorted(path.name for path in (self.kernel, *self.debs, *self.wheels))


def fetch(recipe: Recipe, directory: Path) -> Packages:
    """Resolve and download into `directory`, where earlier downloads are reused.

    :raise ArmHostError: When a tool is missing or a download fails.
    """
    for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
        if shutil.which(tool) is None:
            raise ArmHostError(f"{tool} is missing ({package}); the host is built from Debian packages")
    if not _KEYRING.exists():
        raise ArmHostError(f"{_KEYRING} is missing: apt install debian-archive-keyring")
    apt = _Apt(directory / "apt", recipe)
    apt.run("update")
    names = _KERNEL.findall(apt.output("depends", "--no-recommends", "linux-image-arm64", tool="apt-cache"))
    if not names:
        raise ArmHostError(f"linux-image-arm64 in {KERNELS[recipe.kernel]} names no kernel")
    (kernel,) = apt.download((names[0],), dependencies=False)
    debs = apt.download(DEBIAN_PACKAGES, dependencies=True)
    return Packages(kernel, debs, _fetch_wheels(recipe.python_packages, directory / "wheels"))


class _Apt:
    """apt with a state of its own."""

    def __init__(self, directory: Path, recipe: Recipe) -> None:
        self._directory = directory / recipe.kernel
        self._archives = directory / "archives"
        for name in _FOLDERS:
            (self._directory / name).mkdir(parents=True, exist_ok=True)
        self._archives.mkdir(exist_ok=True)
        mirror = os.environ.get("STERNA_DEBIAN_MIRROR", MIRROR)
        sources = [f"deb [signed-by={_KEYRING}] {mirror} {suite} main\n" for suite in recipe.suites]
        (self._directory / "etc/sources.list").write_text("".join(sources))
        (self._directory / "etc/preferences").write_text(
            f"Package: linux-image-*\nPin: release n={KERNELS[recipe.kernel]}\nPin-Priority: 900\n"
        )
        (self._directory / "state/status").touch()
        settings = {
            "Dir::State": self._directory / "state",
            "Dir::State::status": self._directory / "state/status",
            "Dir::Cache": self._directory,
            # An empty one: apt does not list what it finds there.
            "Dir::Cache::archives": self._directory / "no-archives",
            "Dir::Etc": self._directory / "etc",
            "Dir::Etc::trustedparts": self._directory / "etc/trusted.gpg.d",
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        self._options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]

    def output(self, *arguments: str, tool: str = "apt-get") -> str:
        """Run a tool of apt's: what it prints."""
        # The machine's own configuration is read before ours: proxies stay, all else is overruled.
        return _run([tool, "-q", *self._options, *arguments])

    def run(self, *arguments: str) -> None:
        """Run apt-get."""
        self.output(*arguments)

    def download(self, packages: Sequence[str], *, dependencies: bool) -> tuple[Path, ...]:
        """Download packages, and if asked all that they depend on: the files, sorted."""
        action = ["install", "--yes"] if dependencies else ["download"]
        listing = self.output("--print-uris", "-q", *action, *packages)
        found = [match["file"] for line in listing.splitlines() if (match := _URI_LINE.match(line.strip()))]
        needed = [name for name in found if name.partition("_")[0] not in LEFT_OUT]
        paths = [self._archives / name for name in needed]
        if any(not path.exists() for path in paths):
            names = [
                f"{name}={version.replace('%3a', ':')}"
                for name, version, _ in (file.split("_") for file in needed)
            ]
            _run(["apt-get", "-q", *self._options, "download", *names], cwd=self._archives)
        if missing := [path.name for path in paths if not path.exists()]:
            raise ArmHostError(f"apt-get downloaded no {missing[0]}")
        return tuple(sorted(paths))


def _fetch_wheels(wanted: Sequence[str], directory: Path) -> tuple[Path, ...]:
    # Resolved anew, into an empty folder; pip keeps what it downloaded in a cache of its own.
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    platforms = [part for platform in WHEEL_PLATFORMS for part in ("--platform", platform)]
    python = ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    _run(
        [
            *(
                sys.executable,
                "-m",
                "pip",
                "--disable-pip-version-check",
                "download",
                "--dest",
                str(directory),
            ),
            *(*python, *platforms, "--only-binary=:all:", *wanted),
        ]
    )
    return tuple(sorted(directory.glob("*.whl")))


def _run(command: Sequence[str], cwd: Path | None = None) -> str:
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"}
    try:
        result = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ArmHostError(f"{command[0]} did not finish in {_TIMEOUT_S} s: {' '.join(command)}") from None
    if result.returncode:
        words = "; ".join(result.stderr.strip().splitlines()[-_MESSAGE_LINES:])
        raise ArmHostError(
            f"{Path(command[0]).name} failed ({SUITE}, arm64): {words or f'exit code {result.returncode}'}"
        )
    return result.stdout
