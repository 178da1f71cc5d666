"""The ARM platform: Cortex-A15 CPUs with a GICv2."""

import logging
from collections.abc import Sequence

from sterna.arch.arm.board import ArmBoard
from sterna.arch.arm.platform import ArmVcpu, GicPlatform
from sterna.arch.armv7.cortexa15 import reset_values
from sterna.arch.armv7.section import CPU, CPU_COMMON, load_cpu, save_cpu
from sterna.arch.armv7.state import ArmVcpuState
from sterna.machine.devices.device import Stopped, by_name, key_text
from sterna.machine.devices.gic.registers import SPURIOUS
from sterna.stream.vmstate import DeviceState, StreamError

log = logging.getLogger(__name__)


class ArmPlatform(GicPlatform[ArmVcpuState]):
    """The CPUs and the interrupt controller of a machine."""

    descriptions = by_name(CPU_COMMON, CPU)
    section = CPU.name
    timer = "arm,armv7-timer"

    def __init__(self, board: ArmBoard, vcpus: Sequence[ArmVcpu[ArmVcpuState]]) -> None:
        super().__init__(board, vcpus)
        self._known_registers = frozenset(vcpus[0].get_state().cp15)
        self._others = reset_values(len(vcpus), board.peripheral_base)

    def save(self, stopped: Stopped) -> list[DeviceState]:
        """The CPUs' sections."""
        states = self._states(stopped)
        pending = self._gic.pending(stopped.timer_lines)
        return [
            section
            for index, (state, irq) in enumerate(zip(states, pending, strict=True))
            for section in save_cpu(state, index, irq != SPURIOUS, self._others)
        ]

    def _load(self, section: DeviceState, stopped: Stopped) -> ArmVcpuState:
        state, left_out = load_cpu(section, stopped.counter, self._known_registers, self._others)
        for field, what in left_out.items():
            if CPU.name not in stopped.ignored:
                where = key_text((CPU.name, section.instance_id))
                raise StreamError(f"{what}; this machine has no place for it", where).inside(field)
            log.warning("CPU %d: field %s, %s, has no place here", section.instance_id, field, what)
        return state
