"""Accelerators with a fault each, for tests of the test bed: `broken:NAME`.

Only the program that the test bed starts for them (`sterna.cli.broken`) registers them: nothing else knows that they exist.
"""

from functools import partial

from sterna.hypervisor.emulated.broken import BREAKAGES, broken_vm
from sterna.machine.accel import EMULATED_LOGS, Accelerator, check_emulated, emulated_vm, register
from sterna.machine.boards import VIRT

__all__ = ["BREAKAGES", "LAUNCHER", "accel_name", "register_all"]

LAUNCHER = "sterna.cli.broken"
"""The module that runs the command line with these accelerators."""


def accel_name(breakage: str) -> str:
    """What `--accel` calls it."""
    return f"broken:{breakage}"


def register_all() -> None:
    """Have every breakage as an accelerator."""
    for breakage in BREAKAGES:
        create = partial(emulated_vm, broken_vm(breakage))
        register(Accelerator(accel_name(breakage), check_emulated, create, VIRT, EMULATED_LOGS))
