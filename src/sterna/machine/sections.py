"""The sections of an ARM machine: which there are, and a whole machine's state from and to them."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from sterna.hypervisor.arm import COUNTER_HZ, ArmVcpuState
from sterna.machine.board import ArmBoard, Board
from sterna.machine.clock import TIMER, load_counter, save_counter
from sterna.machine.devices.gic.registers import SPURIOUS, GicRegisters
from sterna.machine.devices.gic.section import ARM_GIC, load_gic, save_gic
from sterna.machine.devices.pl011 import Pl011Registers
from sterna.machine.globalstate import GLOBAL_STATE, load_run_state, save_run_state
from sterna.machine.runstate import RunState
from sterna.machine.state.cortexa15 import reset_values
from sterna.machine.state.cpu import CPU, CPU_COMMON, load_cpu, save_cpu
from sterna.machine.state.pl011 import PL011, load_pl011, save_pl011
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription

log = logging.getLogger(__name__)

DESCRIPTIONS: Mapping[str, VmStateDescription] = {
    description.name: description for description in (TIMER, CPU_COMMON, CPU, ARM_GIC, PL011, GLOBAL_STATE)
}
"""How each section is laid out, by its name."""


SectionKey = tuple[str, int]
"""A section's name and instance."""


@dataclass(frozen=True)
class MachineState:
    """All of a stopped ARM machine but its RAM.

    :ivar counter: the guest's counter, in ticks
    :ivar run_state: the state the machine was in before it stopped for the migration; None when the stream does not say
    """

    counter: int
    cpus: tuple[ArmVcpuState, ...]
    gic: GicRegisters
    uarts: tuple[Pl011Registers, ...]
    run_state: RunState | None


def save(
    state: MachineState, current_pending: Sequence[int], board: ArmBoard, counter_hz: int = COUNTER_HZ
) -> list[DeviceState]:
    """A machine's sections, in the order they are sent.

    :param current_pending: the GIC's highest pending interrupt of each CPU
    """
    others = reset_values(len(state.cpus), board.peripheral_base)
    sections = [save_counter(state.counter, counter_hz)]
    for index, cpu in enumerate(state.cpus):
        sections += save_cpu(cpu, index, current_pending[index] != SPURIOUS, others)
    sections.append(save_gic(state.gic, current_pending))
    sections += [save_pl011(uart, index) for index, uart in enumerate(state.uarts)]
    if state.run_state is not None:
        sections.append(save_run_state(state.run_state))
    return sections


def load(
    sections: Sequence[DeviceState],
    board: ArmBoard,
    smp: int,
    known: Collection[int],
    ignored: Collection[str] = (),
    counter_hz: int = COUNTER_HZ,
) -> MachineState:
    """A machine's state from its sections. Nothing is applied: what this returns has been checked as a whole.

    :param known: system registers that the hypervisor keeps
    :param ignored: names of sections of which what has no place here does not matter
    :raise StreamError: When a section is missing, comes twice, belongs to no device of this machine, or has values that the
        device cannot have, or that have no place here.
    """
    found = collect(sections, board, smp, per_cpu=(CPU_COMMON.name, CPU.name), others=(ARM_GIC.name,))
    counter = load_counter(found[TIMER.name, 0], counter_hz)
    cpus = []
    others = reset_values(smp, board.peripheral_base)
    for index in range(smp):
        cpu = load_cpu(found[CPU.name, index], counter, known, others)
        for field, what in cpu.left_out.items():
            if CPU.name not in ignored:
                raise StreamError(
                    f"{what}; this machine has no place for it", _text((CPU.name, index))
                ).inside(field)
            log.warning("CPU %d: field %s, %s, has no place here", index, field, what)
        cpus.append(cpu.state)
    run_state = found.get((GLOBAL_STATE.name, 0))
    return MachineState(
        counter=counter,
        cpus=tuple(cpus),
        gic=load_gic(found[ARM_GIC.name, 0], smp),
        uarts=tuple(load_pl011(found[PL011.name, index]) for index in range(len(board.uarts))),
        run_state=None if run_state is None else load_run_state(run_state),
    )


def collect(
    sections: Sequence[DeviceState],
    board: Board,
    smp: int,
    *,
    per_cpu: Collection[str],
    others: Collection[str],
) -> dict[SectionKey, DeviceState]:
    """The sections by name and instance.

    :param per_cpu: sections that each CPU has
    :param others: sections of which there is one, besides those that every machine has
    :raise StreamError: When a section is missing, comes twice, or belongs to no device of this machine.
    """
    required = {(name, 0) for name in (TIMER.name, *others)}
    required |= {(PL011.name, index) for index in range(len(board.uarts))}
    required |= {(name, index) for name in per_cpu for index in range(smp)}
    found: dict[SectionKey, DeviceState] = {}
    for section in sections:
        key = (section.name, section.instance_id)
        if key not in required and key != (GLOBAL_STATE.name, 0):
            if section.name in per_cpu:
                raise StreamError(
                    f"the source has a CPU {section.instance_id}, this machine has {smp} (set smp to match)",
                    _text(key),
                )
            raise StreamError(f"this machine ({board.name}) has no such device", _text(key))
        if key in found:
            raise StreamError("the section comes twice", _text(key))
        found[key] = section
    if missing := sorted(required - set(found)):
        raise StreamError(
            f"the section is missing; this machine ({board.name}, {smp} CPUs) has it", _text(missing[0])
        )
    return found


def _text(key: SectionKey) -> str:
    name, instance = key
    return f"{name} {instance}"
