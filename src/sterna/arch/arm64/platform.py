"""The AArch64 platform: CPUs with a GICv2."""

from sterna.arch.arm.platform import GicPlatform
from sterna.arch.arm64.section import ARM64_CPU, load_cpu, save_cpu
from sterna.arch.arm64.state import Arm64VcpuState
from sterna.machine.devices.device import Stopped, by_name
from sterna.stream.vmstate import DeviceState


class Arm64Platform(GicPlatform[Arm64VcpuState]):
    """The CPUs and the interrupt controller of a machine."""

    descriptions = by_name(ARM64_CPU)
    section = ARM64_CPU.name
    timer = "arm,armv8-timer"

    def save(self, stopped: Stopped) -> list[DeviceState]:
        """The CPUs' sections."""
        return [save_cpu(state, index) for index, state in enumerate(self._states(stopped))]

    def _load(self, section: DeviceState, stopped: Stopped) -> Arm64VcpuState:
        return load_cpu(section, stopped.counter)
