"""The x86_64 platform: CPUs in long mode without interrupts, and the timer that they sleep by."""

from collections.abc import Callable, Collection, Mapping, Sequence

from sterna.hypervisor.interface import HypervisorError, Vm
from sterna.hypervisor.x86 import X86Vcpu
from sterna.machine import longmode
from sterna.machine.board import X86Board
from sterna.machine.clock import TIMER, load_counter, save_counter
from sterna.machine.devices.irq import IrqLine
from sterna.machine.devices.sleeptimer import SleepTimer
from sterna.machine.globalstate import GLOBAL_STATE, load_run_state, save_run_state
from sterna.machine.guestram import GuestRam
from sterna.machine.platforms import Common
from sterna.machine.registerdump import dump_x86_registers
from sterna.machine.sections import collect
from sterna.machine.state.pl011 import PL011, load_pl011, save_pl011
from sterna.machine.state.x86 import X86_CPU, load_cpu, save_cpu
from sterna.memory.address import PAGE_SIZE
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription

DESCRIPTIONS: Mapping[str, VmStateDescription] = {
    description.name: description for description in (TIMER, X86_CPU, PL011, GLOBAL_STATE)
}
"""How each section is laid out, by its name."""


class X86Platform:
    """The CPUs and the sleep timer of a machine; see the protocol for its calls."""

    descriptions: Mapping[str, VmStateDescription] = DESCRIPTIONS

    def __init__(self, vm: Vm, board: X86Board, vcpus: Sequence[X86Vcpu]) -> None:
        self.vcpus = vcpus
        self._board = board
        self._hz = vm.counter_hz
        vm.add_mmio(board.sleep_timer, PAGE_SIZE, SleepTimer(vcpus))

    def line(self, irq: int) -> IrqLine:
        """There are no interrupts: devices are polled."""

        def ignore(level: bool) -> None:
            pass

        return ignore

    def start(self, entry: int, ram: GuestRam) -> None:
        """All CPUs at `entry` in long mode, each with its number."""
        board = self._board
        ram.write(board.page_tables, longmode.page_tables(board.page_tables))
        for vcpu in self.vcpus:
            state = vcpu.get_state()
            longmode.start(state, entry, vcpu.index, board.page_tables, board.time_record(vcpu.index))
            vcpu.set_state(state)

    def dump(self, cpu: int) -> str:
        """A CPU's general and control registers."""
        return dump_x86_registers(self.vcpus[cpu].get_state())

    def position(self, cpu: int) -> int:
        """A CPU's program counter."""
        return self.vcpus[cpu].get_state().regs["rip"]

    def save(self, common: Common) -> list[DeviceState]:
        """The sections of CPUs and UARTs."""
        states = [save_counter(common.counter, self._hz)]
        states += [save_cpu(vcpu.get_state(), vcpu.index) for vcpu in self.vcpus]
        states += [save_pl011(uart, index) for index, uart in enumerate(common.uarts)]
        if common.run_state is not None:
            states.append(save_run_state(common.run_state))
        return states

    def load(
        self, states: Sequence[DeviceState], ignored: Collection[str]
    ) -> tuple[Common, Callable[[], None]]:
        """Check the sections; see the protocol. What only the hypervisor can check is when it gets the CPUs."""
        smp = len(self.vcpus)
        found = collect(states, self._board, smp, per_cpu=(X86_CPU.name,), others=())
        cpus = [load_cpu(found[X86_CPU.name, index]) for index in range(smp)]
        run_state = found.get((GLOBAL_STATE.name, 0))
        common = Common(
            counter=load_counter(found[TIMER.name, 0], self._hz),
            uarts=tuple(load_pl011(found[PL011.name, index]) for index in range(len(self._board.uarts))),
            run_state=None if run_state is None else load_run_state(run_state),
        )

        def apply() -> None:
            for vcpu, state in zip(self.vcpus, cpus, strict=True):
                try:
                    vcpu.set_state(state)
                except HypervisorError as error:
                    raise StreamError(str(error), f"{X86_CPU.name} {vcpu.index}") from error

        return common, apply
