"""A small migration that has all kernels compiled, so that none is compiled while a big one is timed."""

import importlib.util

from sterna.cli.display import Display
from sterna.cli.errors import CliError
from sterna.cli.follow import Interrupts
from sterna.cli.kernels import COMPILING, Stamp
from sterna.machine.config import MEBIBYTE, MachineConfig

_MEMORY = 16 * MEBIBYTE


def rehearse(display: Display, interrupts: Interrupts, accel: str = "emulated") -> None:
    """Migrate a small guest unless that has been done with this program, Python, numba and hypervisor before, or there is nothing
    to compile.

    :raise CliError: When it fails.
    """
    from sterna.cli.trial import TrialSettings, run_trial

    if importlib.util.find_spec("numba") is None:
        return
    stamp = Stamp("rehearsed" if accel == "emulated" else f"rehearsed-{accel}")
    if stamp.exists():
        return
    display.note(COMPILING)
    config = MachineConfig(memory_bytes=_MEMORY, accel=accel, kernel="dirtyram", append="64 16 1")
    result = run_trial(
        TrialSettings(config, bandwidth=0, downtime_limit_ms=300, auto_converge=True), Display(), interrupts
    )
    if result["status"] == "cancelled":
        raise CliError("interrupted")
    if result["verified"]:
        stamp.set()
