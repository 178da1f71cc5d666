"""The QEMU on this machine."""

import re
import shutil
import subprocess
from dataclasses import dataclass

from sterna.launch.errors import LaunchError, Unsupported

_PROBE_SECONDS = 30
_VERSION = re.compile(r"QEMU emulator version (\d+\.\d+(?:\.\d+)?)", re.ASCII)


@dataclass(frozen=True)
class Qemu:
    """A QEMU's program."""

    path: str
    version: str


def find_qemu(named: str | None) -> Qemu:
    """The QEMU for ARM that the user named, or the one in the path.

    :raise LaunchError: When the one that was named is not there, or is no QEMU; `Unsupported` of the one in the path.
    """
    wanted, wrong = named or "qemu-system-arm", LaunchError if named else Unsupported
    path = shutil.which(wanted)
    if path is None:
        raise wrong(f"{wanted} is not installed" + ("" if named else ": apt install qemu-system-arm"))
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise wrong(f"cannot run {path}: {error}") from error
    told = _VERSION.search(done.stdout)
    if told is None:
        raise wrong(f"{path} does not tell that it is a QEMU: {(done.stdout or done.stderr)[:80]!r}")
    return Qemu(path, told[1])
