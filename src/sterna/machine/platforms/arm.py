"""The ARM platform: Cortex-A15 CPUs with a GICv2."""

from collections.abc import Callable, Collection, Mapping, Sequence

from sterna.hypervisor.arm import ArmVcpu, ArmVcpuState
from sterna.hypervisor.interface import Vm
from sterna.machine import sections
from sterna.machine.board import ArmBoard
from sterna.machine.devices.gic.controller import Gic, GicCpuInterface, GicDistributor
from sterna.machine.devices.irq import IrqLine
from sterna.machine.guestram import GuestRam
from sterna.machine.platforms import Common
from sterna.machine.registerdump import dump_registers
from sterna.machine.state.cpu import timer_line
from sterna.stream.vmstate import DeviceState, VmStateDescription

_SVC_MODE_MASKED = 0x1D3
_THUMB = 1 << 5


class ArmPlatform:
    """The CPUs and the interrupt controller of a machine; see the protocol for its calls."""

    descriptions: Mapping[str, VmStateDescription] = sections.DESCRIPTIONS

    def __init__(self, vm: Vm, board: ArmBoard, vcpus: Sequence[ArmVcpu]) -> None:
        self.vcpus = vcpus
        self._board = board
        self._hz = vm.counter_hz
        self._known_registers = frozenset(vcpus[0].get_state().cp15)
        self._gic = Gic(board.gic.irqs, vcpus)
        vm.add_mmio(board.gic.distributor, board.gic.distributor_bytes, GicDistributor(self._gic))
        vm.add_mmio(board.gic.cpu_interface, board.gic.cpu_interface_bytes, GicCpuInterface(self._gic))

    def line(self, irq: int) -> IrqLine:
        """A line of the GIC."""
        return self._gic.line(irq)

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry` in supervisor mode; those that PSCI starts wait for it."""
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            state.regs[15] = entry & ~1
            state.cpsr = _SVC_MODE_MASKED | (_THUMB if entry & 1 else 0)
            vcpu.set_state(state)

    def dump(self, cpu: int) -> str:
        """A CPU's core registers."""
        return dump_registers(self.vcpus[cpu].get_state())

    def position(self, cpu: int) -> int:
        """A CPU's program counter."""
        return self.vcpus[cpu].get_state().regs[15]

    def save(self, common: Common) -> list[DeviceState]:
        """The sections of CPUs, GIC and UARTs."""
        cpus = [self._cpu_state(vcpu, common.counter) for vcpu in self.vcpus]
        registers, pending = self._gic.save([timer_line(cpu) for cpu in cpus])
        state = sections.MachineState(common.counter, tuple(cpus), registers, common.uarts, common.run_state)
        return sections.save(state, pending, self._board, self._hz)

    @staticmethod
    def _cpu_state(vcpu: ArmVcpu, counter: int) -> ArmVcpuState:
        state = vcpu.get_state()
        state.counter = counter
        return state

    def load(
        self, states: Sequence[DeviceState], ignored: Collection[str]
    ) -> tuple[Common, Callable[[], None]]:
        """Check the sections; see the protocol."""
        state = sections.load(states, self._board, len(self.vcpus), self._known_registers, ignored, self._hz)

        def apply() -> None:
            for vcpu, cpu in zip(self.vcpus, state.cpus, strict=True):
                vcpu.set_state(cpu)
            self._gic.load(state.gic)

        return Common(state.counter, state.uarts, state.run_state), apply
