"""Debian packages of any architecture, fetched by apt without touching this machine's own.

apt works in a directory of its own, with an empty package status: it resolves what the packages need for a fresh system,
checks signatures with Debian's keyring, and only downloads.
"""

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from sterna.testbed.errors import ImageError

SUITE = "bookworm"
_MIRROR = "STERNA_DEBIAN_MIRROR"
"""Names the archive to use instead of the one that this machine's own apt uses."""
_TARGETS = "$(REPO_URI) $(LABEL)"

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
# 'URI' FILE SIZE HASH, as apt-get --print-uris has it.
_URI_LINE = re.compile(r"^'[^']*' (?P<file>\S+) \d+ SHA256:(?P<hash>\S+)$")
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
    :raise ImageError: When a tool is missing, or there is no mirror, or it cannot be reached.
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
        (own / "etc/sources.list").write_text(f"deb [signed-by={_KEYRING}] {_mirror()} {suite} main\n")
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
            "Acquire::ForceHash": "SHA256",
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
        found = (_URI_LINE.match(line.strip()) for line in listing.splitlines())
        # By the signed index, whatever is there from before.
        digests = {
            match["file"]: match["hash"]
            for match in found
            if match and match["file"].partition("_")[0] not in left_out
        }
        if wrong := self._wrong(digests):
            for name in wrong:
                (self._archives / name).unlink(missing_ok=True)
            versions = (name.split("_") for name in wrong)
            names = [f"{name}={version.replace('%3a', ':')}" for name, version, _ in versions]
            self._output("download", *names, cwd=self._archives)
            if wrong := self._wrong(digests):
                raise ImageError(f"apt-get downloaded no {wrong[0]} as the index has it")
        return tuple(sorted(self._archives / name for name in digests))

    def _wrong(self, digests: Mapping[str, str]) -> list[str]:
        """Those of these files that are not there, or are others than they should be."""
        return [name for name, digest in digests.items() if _digest(self._archives / name) != digest]

    def _output(self, *arguments: str, tool: str = "apt-get", cwd: Path | None = None) -> str:
        """Run a tool of apt's: what it prints."""
        # The machine's own configuration is read before ours: proxies stay, all else is overruled.
        return run([tool, "-q", *self._options, *arguments], f"{self._suite}, {self._architecture}", cwd)


def _digest(path: Path) -> str:
    """SHA-256 of a file; nothing when there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _mirror() -> str:
    """Where packages come from: what STERNA_DEBIAN_MIRROR names, or else the archive that this machine's own apt uses.

    :raise ImageError: When it uses none.
    """
    if told := os.environ.get(_MIRROR):
        return told
    targets = run(["apt-get", "indextargets", "--format", _TARGETS, "Created-By: Packages"], "indextargets")
    found = [line.partition(" ") for line in targets.splitlines()]
    # The label is known once apt-get update has run; without it the archive is told by its path.
    for uri, _, label in found:
        if label == "Debian" or (not label and Path(uri).name == "debian"):
            return uri
    raise ImageError(f"this machine's apt uses no Debian archive: name one by {_MIRROR}=URL")


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
