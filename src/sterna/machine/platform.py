"""What a guest's architecture adds to a machine: its CPUs, how they start, and the devices that go with them."""

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Generic, TypeVar

from sterna.hypervisor.interface import HypervisorError, Vcpu
from sterna.machine.board import Board
from sterna.machine.devices.device import Apply, Device, SectionKey, key_text
from sterna.machine.devices.irq import IrqLine
from sterna.machine.devices.node import Node
from sterna.machine.guestram import GuestRam
from sterna.stream.vmstate import StreamError

BoardT = TypeVar("BoardT", bound=Board)
CpuT = TypeVar("CpuT", bound=Vcpu)


class Platform(Device, ABC, Generic[BoardT, CpuT]):
    """One machine's CPUs: a device that has its sections once for each CPU, and those that its architecture gives them.

    :cvar interrupt_parent: the interrupt controller in the device tree, or None when there are no interrupts
    :ivar vcpus: the CPUs, by index
    :ivar devices: those that go with them, in the order of the stream
    """

    interrupt_parent: ClassVar[int | None] = None

    def __init__(self, board: BoardT, vcpus: Sequence[CpuT]) -> None:
        self._board = board
        self.vcpus = vcpus
        self.devices: Sequence[Device] = ()

    @classmethod
    @abstractmethod
    def write_nodes(cls, root: Node, board: BoardT, smp: int, cpu: str) -> None:
        """The nodes of the CPUs, and of what goes with them.

        :param cpu: what the CPUs are compatible with
        """

    @abstractmethod
    def line(self, irq: int) -> IrqLine:
        """The interrupt line of a device on the board."""

    @abstractmethod
    def start(self, entry: int, ram: GuestRam) -> None:
        """Let all CPUs begin at `entry`, as after a reset."""

    @abstractmethod
    def dump(self, cpu: int) -> str:
        """A CPU's registers as text. The CPU is not running."""

    @abstractmethod
    def position(self, cpu: int) -> int:
        """A CPU's program counter. The CPU is not running."""

    def sections(self) -> Sequence[SectionKey]:
        """Those of each CPU."""
        return [(name, vcpu.index) for vcpu in self.vcpus for name in self.descriptions]

    def surplus(self, key: SectionKey) -> StreamError:
        """More CPUs than there are."""
        text = f"the source has a CPU {key[1]}, this machine has {len(self.vcpus)} (set smp to match)"
        return StreamError(text, key_text(key))

    def _to_apply(self, states: Sequence[object], section: str) -> Apply:
        """What gives each CPU its state, which comes from such a section. Some of it the hypervisor alone can check."""

        def apply() -> None:
            vcpus: Sequence[Any] = self.vcpus  # each architecture's takes its own kind of state
            for vcpu, state in zip(vcpus, states, strict=True):
                try:
                    vcpu.set_state(state)
                except HypervisorError as error:
                    raise StreamError(str(error), key_text((section, vcpu.index))) from error

        return apply


def platform_of(board: Board) -> type[Platform[Any, Any]]:
    """A board's kind of platform: its machines' VMs have vCPUs of its architecture."""
    kind: type[Platform[Any, Any]] = pkgutil.resolve_name(board.architecture.platform)
    return kind


def write_cpus(root: Node, smp: int, compatible: str, *, psci: bool = False) -> None:
    """The CPUs' nodes."""
    cpus = root.child("cpus")
    cpus.words("#address-cells", 1)
    cpus.words("#size-cells", 0)
    for index in range(smp):
        cpu = cpus.child(f"cpu@{index}")
        cpu.strings("device_type", "cpu")
        cpu.strings("compatible", compatible)
        if psci:
            cpu.strings("enable-method", "psci")
        cpu.words("reg", index)
