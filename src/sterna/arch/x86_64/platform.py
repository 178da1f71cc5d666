"""The x86_64 platform: CPUs in long mode without interrupts, and the timer that they sleep by."""

from collections.abc import Sequence
from typing import Protocol

from sterna.arch.x86_64 import longmode
from sterna.arch.x86_64.board import X86Board
from sterna.arch.x86_64.section import X86_CPU, load_cpu, save_cpu
from sterna.arch.x86_64.sleeptimer import Sleeper, SleepTimer
from sterna.arch.x86_64.state import X86VcpuState
from sterna.hypervisor.interface import StatefulVcpu
from sterna.machine.devices.device import Stopped, by_name
from sterna.machine.devices.irq import IrqLine
from sterna.machine.guestram import GuestRam
from sterna.machine.platform import Platform
from sterna.stream.vmstate import DeviceState


class X86Vcpu(StatefulVcpu[X86VcpuState], Sleeper, Protocol):
    """An x86_64 CPU."""


class X86Platform(Platform[X86Board, X86VcpuState]):
    """The CPUs and the sleep timer of a machine."""

    descriptions = by_name(X86_CPU)
    section = X86_CPU.name

    def __init__(self, board: X86Board, vcpus: Sequence[X86Vcpu]) -> None:
        super().__init__(board, vcpus)
        self.devices = (SleepTimer(board.sleep_timer, vcpus),)

    def line(self, irq: int) -> IrqLine:
        """There are no interrupts: devices are polled."""
        return lambda level: None

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry` in long mode, each with its number."""
        board = self._board
        ram.write(board.page_tables, longmode.page_tables(board.page_tables))
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            longmode.start(state, entry, vcpu.index, board.page_tables, board.time_record(vcpu.index))
            vcpu.set_state(state)

    def save(self, stopped: Stopped) -> list[DeviceState]:
        """The CPUs' sections."""
        return [save_cpu(vcpu.get_state(), vcpu.index) for vcpu in self.vcpus]

    def _load(self, section: DeviceState, stopped: Stopped) -> X86VcpuState:
        return load_cpu(section)
