"""The AArch64 platform: this host's CPUs with a GICv2."""

from collections.abc import Callable, Collection, Mapping, Sequence

from sterna.hypervisor.arm64 import CNTV_CTL, CNTV_CVAL, Arm64Vcpu, Arm64VcpuState
from sterna.hypervisor.interface import HypervisorError, Vm
from sterna.machine.board import ArmBoard
from sterna.machine.clock import TIMER, load_counter, save_counter
from sterna.machine.devices.gic.controller import Gic, GicCpuInterface, GicDistributor
from sterna.machine.devices.gic.section import ARM_GIC, load_gic, save_gic
from sterna.machine.devices.irq import IrqLine
from sterna.machine.globalstate import GLOBAL_STATE, load_run_state, save_run_state
from sterna.machine.guestram import GuestRam
from sterna.machine.platforms import Common
from sterna.machine.registerdump import dump_arm64_registers
from sterna.machine.sections import collect
from sterna.machine.state.arm64 import ARM64_CPU, load_cpu, save_cpu
from sterna.machine.state.pl011 import PL011, load_pl011, save_pl011
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription

_EL1H_MASKED = 0x3C5
_TIMER_ENABLE, _TIMER_MASKED = 1, 2


class Arm64Platform:
    """The CPUs and the interrupt controller of a machine; see the protocol for its calls."""

    descriptions: Mapping[str, VmStateDescription] = {
        description.name: description for description in (TIMER, ARM64_CPU, ARM_GIC, PL011, GLOBAL_STATE)
    }

    def __init__(self, vm: Vm, board: ArmBoard, vcpus: Sequence[Arm64Vcpu]) -> None:
        self.vcpus = vcpus
        self._board = board
        self._hz = vm.counter_hz
        self._gic = Gic(board.gic.irqs, vcpus)
        vm.add_mmio(board.gic.distributor, board.gic.distributor_bytes, GicDistributor(self._gic))
        vm.add_mmio(board.gic.cpu_interface, board.gic.cpu_interface_bytes, GicCpuInterface(self._gic))

    def line(self, irq: int) -> IrqLine:
        """A line of the GIC."""
        return self._gic.line(irq)

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry` in EL1 with interrupts masked; those that PSCI starts wait for it."""
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            state.pc, state.pstate = entry, _EL1H_MASKED
            vcpu.set_state(state)

    def dump(self, cpu: int) -> str:
        """A CPU's core registers."""
        return dump_arm64_registers(self.vcpus[cpu].get_state())

    def position(self, cpu: int) -> int:
        """A CPU's program counter."""
        return self.vcpus[cpu].get_state().pc

    def save(self, common: Common) -> list[DeviceState]:
        """The sections of CPUs, GIC and UARTs."""
        cpus = [vcpu.get_state().at(common.counter) for vcpu in self.vcpus]
        states = [save_counter(common.counter, self._hz)]
        states += [save_cpu(cpu, index) for index, cpu in enumerate(cpus)]
        states.append(save_gic(*self._gic.save([_timer_line(cpu, common.counter) for cpu in cpus])))
        states += [save_pl011(uart, index) for index, uart in enumerate(common.uarts)]
        if common.run_state is not None:
            states.append(save_run_state(common.run_state))
        return states

    def load(
        self, states: Sequence[DeviceState], ignored: Collection[str]
    ) -> tuple[Common, Callable[[], None]]:
        """Check the sections; see the protocol. What only the hypervisor can check is when it gets the CPUs."""
        smp = len(self.vcpus)
        found = collect(states, self._board, smp, per_cpu=(ARM64_CPU.name,), others=(ARM_GIC.name,))
        counter = load_counter(found[TIMER.name, 0], self._hz)
        cpus = [load_cpu(found[ARM64_CPU.name, index], counter) for index in range(smp)]
        registers = load_gic(found[ARM_GIC.name, 0], smp)
        run_state = found.get((GLOBAL_STATE.name, 0))
        common = Common(
            counter=counter,
            uarts=tuple(load_pl011(found[PL011.name, index]) for index in range(len(self._board.uarts))),
            run_state=None if run_state is None else load_run_state(run_state),
        )

        def apply() -> None:
            for vcpu, state in zip(self.vcpus, cpus, strict=True):
                try:
                    vcpu.set_state(state)
                except HypervisorError as error:
                    raise StreamError(str(error), f"{ARM64_CPU.name} {vcpu.index}") from error
            self._gic.load(registers)

        return common, apply


def _timer_line(state: Arm64VcpuState, counter: int) -> bool:
    """Whether the virtual timer asserts its interrupt (ARM DDI 0487, D11.2.4)."""
    on = state.system[CNTV_CTL] & (_TIMER_ENABLE | _TIMER_MASKED) == _TIMER_ENABLE
    return on and counter >= state.system[CNTV_CVAL]
