"""Accelerators with a fault each, for tests of the test bed: `broken:NAME`.

Only the program that the test bed starts for them (`sterna.cli.broken`) registers them: nothing else knows that they exist.
"""

from dataclasses import replace
from functools import partial

from sterna.hypervisor.accelerator import ACCELERATORS
from sterna.hypervisor.accelerators.emulated import ACCELERATOR, emulated_vm
from sterna.testing.broken import BREAKAGES, broken_vm

__all__ = ["BREAKAGES", "LAUNCHER", "accel_name", "register_all"]

LAUNCHER = "sterna.cli.broken"
"""The module that runs the command line with these accelerators."""


def accel_name(breakage: str) -> str:
    """What `--accel` calls it."""
    return f"broken:{breakage}"


def register_all() -> None:
    """Have every breakage as an accelerator."""
    for breakage in BREAKAGES:
        name, create = accel_name(breakage), partial(emulated_vm, broken_vm(breakage))
        ACCELERATORS.add(name, replace(ACCELERATOR, name=name, create=create))
