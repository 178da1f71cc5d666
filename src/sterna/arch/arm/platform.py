"""What 32-bit and 64-bit ARM have alike: a GICv2, PSCI, the generic timer, and their nodes in the device tree."""

from collections.abc import Sequence
from typing import ClassVar, Generic, Protocol, Self, TypeVar

from sterna.arch.arm.board import ArmBoard
from sterna.arch.arm.psci import Function
from sterna.hypervisor.interface import StatefulVcpu
from sterna.machine.board import VIRTUAL_TIMER_IRQ
from sterna.machine.devices.device import Stopped
from sterna.machine.devices.gic.controller import GIC_PHANDLE, Gic, InterruptTarget
from sterna.machine.devices.irq import LEVEL_HIGH, PPI, IrqLine
from sterna.machine.devices.node import Node
from sterna.machine.devices.pl011 import Pl011
from sterna.machine.guestram import GuestRam
from sterna.machine.platform import CpuState, Platform

_CPU_MASK_SHIFT = 8
_PPI_BASE = 16
# PSCI 0.1 had no fixed numbers: older guests take them from the tree (ARM DEN 0022, 5.1 has those of 0.2).
_PSCI_NUMBERS = {
    "cpu_suspend": int(Function.CPU_SUSPEND),
    "cpu_off": int(Function.CPU_OFF),
    "cpu_on": int(Function.CPU_ON),
    "migrate": 0x8400_0005,
}
# Secure, non-secure physical, virtual, hypervisor timer (the order of the binding arm,arch_timer).
_TIMER_IRQS = (29, 30, VIRTUAL_TIMER_IRQ, 26)


class ArmState(CpuState, Protocol):
    """The registers of an ARM CPU of either kind."""

    @property
    def timer_line(self) -> bool:
        """Whether the virtual timer asserts its interrupt."""
        ...

    def begin(self, entry: int) -> None:
        """Go on at `entry`, with interrupts masked, in the mode of an operating system."""
        ...

    def at(self, counter: int) -> Self:
        """The same with another count."""
        ...


StateT = TypeVar("StateT", bound=ArmState)


class ArmVcpu(StatefulVcpu[StateT], InterruptTarget, Protocol[StateT]):
    """An ARM CPU of either kind."""


class GicPlatform(Platform[ArmBoard, StateT], Generic[StateT]):
    """ARM CPUs and their interrupt controller.

    :cvar timer: what their timers are compatible with
    """

    starts_cpus = "psci"
    interrupt_parent = GIC_PHANDLE
    timer: ClassVar[str]

    def __init__(self, board: ArmBoard, vcpus: Sequence[ArmVcpu[StateT]]) -> None:
        super().__init__(board, vcpus)
        self._gic = Gic(board.gic, vcpus)
        self.devices = (self._gic,)

    def line(self, irq: int) -> IrqLine:
        """A line of the GIC."""
        return self._gic.line(irq)

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry`; those that PSCI starts wait for it."""
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            state.begin(entry)
            vcpu.set_state(state)

    def _states(self, stopped: Stopped) -> list[StateT]:
        """The CPUs' states, at the count at which the machine stopped."""
        states = [vcpu.get_state().at(stopped.counter) for vcpu in self.vcpus]
        stopped.timer_lines = [state.timer_line for state in states]
        return states

    @classmethod
    def write_nodes(cls, root: Node, board: ArmBoard, smp: int, compatible: str) -> None:
        """CPUs, PSCI, timers, the UARTs' clock, GIC."""
        super().write_nodes(root, board, smp, compatible)
        if board.psci:
            psci = root.child("psci")
            psci.strings("compatible", "arm,psci-1.0", "arm,psci-0.2", "arm,psci")
            psci.strings("method", "hvc")
            for name, number in _PSCI_NUMBERS.items():
                psci.words(name, number)
        timer = root.child("timer")
        timer.strings("compatible", cls.timer)
        timer.flag("always-on")
        flags = ((1 << smp) - 1) << _CPU_MASK_SHIFT | LEVEL_HIGH
        timer.words("interrupts", *(cell for irq in _TIMER_IRQS for cell in (PPI, irq - _PPI_BASE, flags)))
        Pl011.write_clock(root)
        Gic.write_node(root, board.gic)
