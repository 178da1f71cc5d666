"""What a guest's architecture adds to a machine: how its CPUs start, the devices that go with them, what they save."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from sterna.hypervisor.interface import Vcpu
from sterna.machine.devices.irq import IrqLine
from sterna.machine.devices.pl011 import Pl011Registers
from sterna.machine.guestram import GuestRam
from sterna.machine.runstate import RunState
from sterna.stream.vmstate import DeviceState, VmStateDescription


@dataclass(frozen=True)
class Common:
    """What every stopped machine saves, whatever its architecture.

    :ivar counter: the guest's counter, in ticks
    :ivar run_state: the state the machine was in before it stopped for the migration; None when the stream does not say
    """

    counter: int
    uarts: tuple[Pl011Registers, ...]
    run_state: RunState | None


class Platform(Protocol):
    """One machine's CPUs, and the devices that its architecture gives them.

    :ivar descriptions: how all sections of such a machine are laid out, by name
    """

    descriptions: Mapping[str, VmStateDescription]

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The CPUs, by index."""
        ...

    def line(self, irq: int) -> IrqLine:
        """The interrupt line of a device on the board."""
        ...

    def start(self, entry: int, ram: GuestRam) -> None:
        """Let all CPUs begin at `entry`, as after a reset."""
        ...

    def dump(self, cpu: int) -> str:
        """A CPU's registers as text. The CPU is not running."""
        ...

    def position(self, cpu: int) -> int:
        """A CPU's program counter. The CPU is not running."""
        ...

    def save(self, common: Common) -> list[DeviceState]:
        """The sections of a stopped machine, in the order they are sent."""
        ...

    def load(
        self, states: Sequence[DeviceState], ignored: Collection[str]
    ) -> tuple[Common, Callable[[], None]]:
        """Check a machine's sections as a whole. Nothing is applied.

        :param ignored: names of sections of which what has no place here does not matter
        :return: what all machines have, and what puts the rest into this one
        :raise StreamError: When a section is missing, unknown, or does not fit this machine.
        """
        ...
