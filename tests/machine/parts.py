"""The devices of an ARMv7 machine without the machine, and their state as a whole."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from tests.machine.still import StillVcpu

from sterna.arch.arm.board import ArmBoard
from sterna.arch.arm.timer import COUNTER_HZ
from sterna.arch.armv7.cp15 import REGISTERS
from sterna.arch.armv7.platform import ArmPlatform
from sterna.arch.armv7.state import ArmVcpuState
from sterna.boards.virt import BOARD as VIRT
from sterna.machine import sections
from sterna.machine.clock import Clock
from sterna.machine.devices.device import Device, Stopped
from sterna.machine.devices.gic.registers import GicRegisters
from sterna.machine.devices.pl011 import Pl011, Pl011Registers
from sterna.machine.globalstate import GlobalState
from sterna.machine.runstate import RunState
from sterna.machine.serial import NullSerial
from sterna.stream.vmstate import DeviceState, VmStateDescription

KNOWN = frozenset(REGISTERS)


@dataclass
class MachineState:
    """All of a stopped machine but its RAM."""

    counter: int
    cpus: tuple[ArmVcpuState, ...]
    gic: GicRegisters
    uarts: tuple[Pl011Registers, ...]
    run_state: RunState | None


class Parts:
    """The devices, with vCPUs that keep what they are given."""

    def __init__(self, cpus: Sequence[ArmVcpuState], board: ArmBoard = VIRT) -> None:
        self.board = board
        self.vcpus = [StillVcpu(index, state) for index, state in enumerate(cpus)]
        self.platform = ArmPlatform(board, self.vcpus)
        self.gic = self.platform._gic
        self.uarts = [
            Pl011(slot, NullSerial(), self.platform.line(slot.irq), number)
            for number, slot in enumerate(board.uarts)
        ]
        self.devices: list[Device] = [
            Clock(COUNTER_HZ),
            self.platform,
            *self.platform.devices,
            *self.uarts,
            GlobalState(),
        ]

    @property
    def descriptions(self) -> dict[str, VmStateDescription]:
        return {name: layout for device in self.devices for name, layout in device.descriptions.items()}


def cpu(counter: int = 1000) -> ArmVcpuState:
    """A CPU with little in its registers."""
    banks = ("usr", "fiq", "irq", "svc", "abt", "und")
    names = [f"{kind}_{bank}" for kind in ("sp", "lr", "spsr") for bank in banks]
    names += [f"r{number}_{bank}" for number in range(8, 13) for bank in ("usr", "fiq")]
    return ArmVcpuState(
        regs=list(range(16)),
        cpsr=0x1D3,
        banked=dict.fromkeys(names, 0),
        cp15=dict.fromkeys(sorted(KNOWN), 0),
        vfp=[0] * 32,
        fpscr=0,
        fpexc=0,
        counter=counter,
    )


def save(state: MachineState, board: ArmBoard = VIRT) -> list[DeviceState]:
    """The sections of a machine in this state. The GIC's lines become what its devices say."""
    parts = Parts(state.cpus, board)
    parts.gic.restore(state.gic)
    for uart, registers in zip(parts.uarts, state.uarts, strict=True):
        uart.restore(registers)
    return sections.save(parts.devices, Stopped(state.counter, state.run_state))


def load(
    states: Sequence[DeviceState], smp: int = 1, board: ArmBoard = VIRT, ignored: Collection[str] = ()
) -> MachineState:
    """What a machine has become that takes these sections."""
    parts = Parts([cpu() for _ in range(smp)], board)
    stopped = Stopped(ignored=ignored)
    sections.load(states, parts.devices, stopped, board.name, smp)()
    return MachineState(
        counter=stopped.counter,
        cpus=tuple(vcpu.state for vcpu in parts.vcpus),
        gic=parts.gic.registers,
        uarts=tuple(uart.snapshot() for uart in parts.uarts),
        run_state=stopped.run_state,
    )
