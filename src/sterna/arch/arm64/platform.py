"""The AArch64 platform: this host's CPUs with a GICv2."""

from collections.abc import Mapping

from sterna.arch.arm.platform import GicPlatform
from sterna.arch.arm.sysreg import CNTV_CTL, CNTV_CVAL
from sterna.arch.arm.timer import is_asserted
from sterna.arch.arm64.dump import dump_registers
from sterna.arch.arm64.section import ARM64_CPU, load_cpu, save_cpu
from sterna.arch.arm64.state import Arm64VcpuState
from sterna.machine.devices.device import Apply, SectionKey, Stopped, by_name
from sterna.machine.guestram import GuestRam
from sterna.stream.vmstate import DeviceState

_EL1H_MASKED = 0x3C5


class Arm64Platform(GicPlatform[Arm64VcpuState]):
    """The CPUs and the interrupt controller of a machine."""

    descriptions = by_name(ARM64_CPU)
    timer = "arm,armv8-timer"

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry` in EL1 with interrupts masked; those that PSCI starts wait for it."""
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            state.pc, state.pstate = entry, _EL1H_MASKED
            vcpu.set_state(state)

    def dump(self, cpu: int) -> str:
        """A CPU's core registers."""
        return dump_registers(self.vcpus[cpu].get_state())

    def position(self, cpu: int) -> int:
        """A CPU's program counter."""
        return self.vcpus[cpu].get_state().pc

    def save(self, stopped: Stopped) -> list[DeviceState]:
        """The CPUs' sections."""
        states = [vcpu.get_state().at(stopped.counter) for vcpu in self.vcpus]
        stopped.timer_lines = [
            is_asserted(state.system[CNTV_CTL], state.system[CNTV_CVAL], stopped.counter) for state in states
        ]
        return [save_cpu(state, index) for index, state in enumerate(states)]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check the CPUs' sections."""
        sections = (found[ARM64_CPU.name, vcpu.index] for vcpu in self.vcpus)
        return self._to_apply([load_cpu(section, stopped.counter) for section in sections], ARM64_CPU.name)
