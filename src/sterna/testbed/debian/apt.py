"""Debian packages of any architecture, fetched by apt without touching this machine's own.

apt works in a directory of its own, with an empty package status: it resolves what the packages need for a fresh system,
checks signatures with Debian's keyring, and only downloads.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sterna.testbed.debian.errors import ImageError

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
"""STERNA_DEBIAN_MIRROR names another."""

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# 'URI' FILE SIZE HASH, as apt-get --print-uris has it.
_URI_LINE = re.compile(r"^'[^']*' (?P<file>\S+) \d+ (?P<hash>\S+)$")
_FOLDERS = (
    *("etc/preferences.d", "etc/sources.list.d", "etc/apt.conf.d", "etc/trusted.gpg.d"),
    *("state/lists/partial", "no-archives/partial"),
)
_TIMEOUT_S = 600
_MESSAGE_LINES = 4


class Apt:
    """apt with a state of its own, up to date when made.

    :param directory: for its state and for downloads, which are reused
    :param architecture: Debian's name of it
    :param suite: where packages come from. What needs packages of another suite as well can only be had by `kernel`.
    :raise ImageError: When a tool is missing, or the mirror cannot be reached.
    """

    def __init__(self, directory: Path, architecture: str, suite: str = SUITE) -> None:
        for tool, package in (("apt-get", "apt"), ("dpkg-deb", "dpkg")):
            if shutil.which(tool) is None:
                raise ImageError(f"{tool} is missing ({package}); images are built from Debian packages")
        if not _KEYRING.exists():
            raise ImageError(f"{_KEYRING} is missing: apt install debian-archive-keyring")
        self._architecture = architecture
        self._suite = suite
        own = directory / suite / architecture
        self._archives = directory / "archives"
        for name in _FOLDERS:
            (own / name).mkdir(parents=True, exist_ok=True)
        self._archives.mkdir(exist_ok=True)
        mirror = os.environ.get("STERNA_DEBIAN_MIRROR", MIRROR)
        (own / "etc/sources.list").write_text(f"deb [signed-by={_KEYRING}] {mirror} {suite} main\n")
        (own / "state/status").touch()
        settings = {
            "Dir::State": own / "state",
            "Dir::State::status": own / "state/status",
            "Dir::Cache": own,
            # An empty one: apt does not list what it finds there.
            "Dir::Cache::archives": own / "no-archives",
            "Dir::Etc": own / "etc",
            "Dir::Etc::trustedparts": own / "etc/trusted.gpg.d",
            "APT::Architecture": architecture,
            "APT::Architectures": architecture,
            "APT::Install-Recommends": "false",
            "APT::Sandbox::User": "",
            # Else a mirror that does not answer is none, and what is known of packages from before will do.
            "APT::Update::Error-Mode": "any",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        self._options = [part for name, value in settings.items() for part in ("-o", f"{name}={value}")]
        self._output("update")

    def kernel(self, metapackage: str) -> Path:
        """Download the kernel that a metapackage (such as linux-image-arm64) stands for today.

        :raise ImageError: When it names none.
        """
        flavour = metapackage.removeprefix("linux-image-")
        wanted = re.compile(rf"linux-image-\d\S*-{re.escape(flavour)}\b")
        names = wanted.findall(self._output("depends", "--no-recommends", metapackage, tool="apt-cache"))
        if not names:
            raise ImageError(f"{metapackage} in {self._suite} names no kernel")
        [path] = self._download([names[0]], ["download"], ())
        return path

    def packages(self, names: Sequence[str], *, left_out: Collection[str] = ()) -> tuple[Path, ...]:
        """Download packages and all that they depend on: the files, sorted.

        :param left_out: packages that are not needed, whatever depends on them
        """
        return self._download(names, ["install", "--yes"], left_out)

    def _download(
        self, packages: Sequence[str], action: Sequence[str], left_out: Collection[str]
    ) -> tuple[Path, ...]:
        listing = self._output("--print-uris", "-q", *action, *packages)
        found = [match["file"] for line in listing.splitlines() if (match := _URI_LINE.match(line.strip()))]
        needed = [name for name in found if name.partition("_")[0] not in left_out]
        paths = [self._archives / name for name in needed]
        if any(not path.exists() for path in paths):
            names = [
                f"{name}={version.replace('%3a', ':')}"
                for name, version, _ in (file.split("_") for file in needed)
            ]
            self._output("download", *names, cwd=self._archives)
        if missing := [path.name for path in paths if not path.exists()]:
            raise ImageError(f"apt-get downloaded no {missing[0]}")
        return tuple(sorted(paths))

    def _output(self, *arguments: str, tool: str = "apt-get", cwd: Path | None = None) -> str:
        """Run a tool of apt's: what it prints."""
        # The machine's own configuration is read before ours: proxies stay, all else is overruled.
        return run([tool, "-q", *self._options, *arguments], f"{self._suite}, {self._architecture}", cwd)


def run(
    command: Sequence[str],
    what_for: str,
    cwd: Path | None = None,
    more: Mapping[str, str] = MappingProxyType({}),
) -> str:
    """Run a program: what it prints.

    :param what_for: for people, when it fails
    :param more: of its environment, beside ours

    :raise ImageError: When it fails; with the end of what it said.
    """
    environment = os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **more}
    try:
        result = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ImageError(f"{command[0]} did not finish in {_TIMEOUT_S} s: {' '.join(command)}") from None
    except OSError as error:
        raise ImageError(f"cannot run {command[0]}: {error.strerror}") from error
    if result.returncode:
        words = "; ".join(result.stderr.strip().splitlines()[-_MESSAGE_LINES:])
        raise ImageError(
            f"{Path(command[0]).name} failed ({what_for}): {words or f'exit code {result.returncode}'}"
        )
    return result.stdout
