"""A timer that a CPU without interrupts sleeps by: what it writes is for how many ns it wants to stand still.

The write ends when the time is over, or before: whoever sleeps looks at the clock. There is no state to save.
"""

from collections.abc import Sequence
from typing import Protocol

from sterna.machine.devices.device import Device, Region
from sterna.memory.address import PAGE_SIZE, Ipa

REGISTER = 0x0
"""Offset of its only register, 64 bits wide, write-only."""


class Sleeper(Protocol):
    """A CPU as the timer sees it."""

    def sleep(self, ns: int) -> None:
        """Stand still."""
        ...


class SleepTimer(Device):
    """The device; CPUs share it, and each sleeps for itself."""

    def __init__(self, ipa: Ipa, cpus: Sequence[Sleeper]) -> None:
        self.regions = (Region(ipa, PAGE_SIZE, self),)
        self._cpus = cpus

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """Nothing to read."""
        return 0

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """Let `cpu` sleep."""
        if offset == REGISTER:
            self._cpus[cpu].sleep(value)
