"""A small migration that has all kernels compiled, so that none is compiled while a big one is timed."""

import importlib.metadata
import os
import platform
from pathlib import Path

import sterna
from sterna.cli.display import Display
from sterna.cli.errors import CliError
from sterna.cli.follow import Interrupts
from sterna.machine.config import MEBIBYTE, MachineConfig
from sterna.memory.kernelcache import cache_directory

_MEMORY = 16 * MEBIBYTE


def rehearse(display: Display, interrupts: Interrupts) -> None:
    """Migrate a small guest unless that has been done with this program, Python and numba before.

    :raise CliError: When it fails.
    """
    from sterna.cli.trial import TrialSettings, run_trial

    stamp = _stamp()
    if stamp.exists():
        return
    display.note("compiling kernels (once)")
    config = MachineConfig(memory_bytes=_MEMORY, kernel="dirtyram", append="64 16 1")
    result = run_trial(TrialSettings(config, bandwidth=0, downtime_limit_ms=300), Display(), interrupts)
    if result["status"] == "cancelled":
        raise CliError("interrupted")
    if result["verified"]:
        try:
            stamp.touch()
        except OSError:
            pass  # rehearse again next time


def _stamp() -> Path:
    directory = os.environ.get("NUMBA_CACHE_DIR") or cache_directory(Path(sterna.__file__).resolve().parent)
    version = importlib.metadata.version("numba")
    return (
        Path(directory)
        / f"rehearsed-{platform.python_implementation()}-{platform.python_version()}-{version}"
    )
