"""What a guest's architecture adds to a machine: its CPUs, how they start, and the devices that go with them."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from sterna.hypervisor.interface import HypervisorError, StatefulVcpu
from sterna.machine.board import Board
from sterna.machine.devices.device import Apply, Device, SectionKey, Stopped, key_text
from sterna.machine.devices.irq import IrqLine
from sterna.machine.devices.node import Node
from sterna.machine.guestram import GuestRam
from sterna.stream.vmstate import DeviceState, StreamError


class CpuState(Protocol):
    """The registers of any CPU."""

    @property
    def position(self) -> int:
        """The program counter."""
        ...

    def dump(self) -> str:
        """The registers as text."""
        ...


BoardT = TypeVar("BoardT", bound=Board)
StateT = TypeVar("StateT", bound=CpuState)


class Platform(Device, ABC, Generic[BoardT, StateT]):
    """One machine's CPUs: a device that has its sections once for each CPU, and those that its architecture gives them.

    :cvar section: the name of that which has a CPU's state
    :cvar starts_cpus: by what a CPU that is off at first is started, in the device tree
    :cvar interrupt_parent: the interrupt controller in the device tree, or None when there are no interrupts
    :ivar vcpus: the CPUs, by index
    :ivar devices: those that go with them, in the order of the stream
    """

    section: ClassVar[str]
    starts_cpus: ClassVar[str]
    interrupt_parent: ClassVar[int | None] = None

    def __init__(self, board: BoardT, vcpus: Sequence[StatefulVcpu[StateT]]) -> None:
        self._board = board
        self.vcpus = vcpus
        self.devices: Sequence[Device] = ()

    @classmethod
    def write_nodes(cls, root: Node, board: BoardT, smp: int, compatible: str) -> None:
        """The nodes of the CPUs, and of what goes with them.

        :param compatible: what the CPUs are
        """
        cpus = root.child("cpus")
        cpus.words("#address-cells", 1)
        cpus.words("#size-cells", 0)
        for index in range(smp):
            cpu = cpus.child(f"cpu@{index}")
            cpu.strings("device_type", "cpu")
            cpu.strings("compatible", compatible)
            if board.secondaries_off:
                cpu.strings("enable-method", cls.starts_cpus)
            cpu.words("reg", index)

    @abstractmethod
    def line(self, irq: int) -> IrqLine:
        """The interrupt line of a device on the board."""

    @abstractmethod
    def start(self, entry: int, ram: GuestRam) -> None:
        """Let all CPUs begin at `entry`, as after a reset."""

    @abstractmethod
    def _load(self, section: DeviceState, stopped: Stopped) -> StateT:
        """A CPU's state from its section.

        :raise StreamError: When it has no place here, or cannot be.
        """

    def dump(self, cpu: int) -> str:
        """A CPU's registers as text. The CPU is not running."""
        return self.vcpus[cpu].get_state().dump()

    def position(self, cpu: int) -> int:
        """A CPU's program counter. The CPU is not running."""
        return self.vcpus[cpu].get_state().position

    def sections(self) -> Sequence[SectionKey]:
        """Those of each CPU."""
        return [(name, vcpu.index) for vcpu in self.vcpus for name in self.descriptions]

    def surplus(self, key: SectionKey) -> StreamError:
        """More CPUs than there are."""
        text = f"the source has a CPU {key[1]}, this machine has {len(self.vcpus)} (set smp to match)"
        return StreamError(text, key_text(key))

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check the CPUs' sections. Some of a state the hypervisor alone can check."""
        states = [self._load(found[self.section, vcpu.index], stopped) for vcpu in self.vcpus]

        def apply() -> None:
            for vcpu, state in zip(self.vcpus, states, strict=True):
                try:
                    vcpu.set_state(state)
                except HypervisorError as error:
                    raise StreamError(str(error), key_text((self.section, vcpu.index))) from error

        return apply


def platform_of(board: Board) -> type[Platform[Any, Any]]:
    """A board's kind of platform: its machines' VMs have vCPUs of its architecture."""
    kind: type[Platform[Any, Any]] = pkgutil.resolve_name(board.architecture.platform)
    return kind
