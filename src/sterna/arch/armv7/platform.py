"""The ARM platform: Cortex-A15 CPUs with a GICv2."""

import logging
from collections.abc import Mapping, Sequence

from sterna.arch.arm.board import ArmBoard
from sterna.arch.arm.platform import ArmVcpu, GicPlatform
from sterna.arch.armv7.cortexa15 import reset_values
from sterna.arch.armv7.dump import dump_registers
from sterna.arch.armv7.section import CPU, CPU_COMMON, load_cpu, save_cpu, timer_line
from sterna.arch.armv7.state import SVC_MODE_MASKED, THUMB, ArmVcpuState
from sterna.machine.devices.device import Apply, SectionKey, Stopped, by_name, key_text
from sterna.machine.devices.gic.registers import SPURIOUS
from sterna.machine.guestram import GuestRam
from sterna.stream.vmstate import DeviceState, StreamError

log = logging.getLogger(__name__)


class ArmPlatform(GicPlatform[ArmVcpuState]):
    """The CPUs and the interrupt controller of a machine."""

    descriptions = by_name(CPU_COMMON, CPU)
    timer = "arm,armv7-timer"

    def __init__(self, board: ArmBoard, vcpus: Sequence[ArmVcpu[ArmVcpuState]]) -> None:
        super().__init__(board, vcpus)
        self._known_registers = frozenset(vcpus[0].get_state().cp15)
        self._others = reset_values(len(vcpus), board.peripheral_base)

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry` in supervisor mode; those that PSCI starts wait for it."""
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            state.regs[15] = entry & ~1
            state.cpsr = SVC_MODE_MASKED | (THUMB if entry & 1 else 0)
            vcpu.set_state(state)

    def dump(self, cpu: int) -> str:
        """A CPU's core registers."""
        return dump_registers(self.vcpus[cpu].get_state())

    def position(self, cpu: int) -> int:
        """A CPU's program counter."""
        return self.vcpus[cpu].get_state().regs[15]

    def save(self, stopped: Stopped) -> list[DeviceState]:
        """The CPUs' sections."""
        states = [vcpu.get_state() for vcpu in self.vcpus]
        for state in states:
            state.counter = stopped.counter
        stopped.timer_lines = [timer_line(state) for state in states]
        pending = self._gic.pending(stopped.timer_lines)
        return [
            section
            for vcpu, state, irq in zip(self.vcpus, states, pending, strict=True)
            for section in save_cpu(state, vcpu.index, irq != SPURIOUS, self._others)
        ]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check the CPUs' sections."""
        states = [self._load_cpu(found[CPU.name, vcpu.index], stopped) for vcpu in self.vcpus]
        return self._to_apply(states, CPU.name)

    def _load_cpu(self, section: DeviceState, stopped: Stopped) -> ArmVcpuState:
        cpu = load_cpu(section, stopped.counter, self._known_registers, self._others)
        for field, what in cpu.left_out.items():
            if CPU.name not in stopped.ignored:
                where = key_text((CPU.name, section.instance_id))
                raise StreamError(f"{what}; this machine has no place for it", where).inside(field)
            log.warning("CPU %d: field %s, %s, has no place here", section.instance_id, field, what)
        return cpu.state
