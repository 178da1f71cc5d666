"""Section `arm_gic`."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from sterna.machine.board import GIC_SPI_BASE
from sterna.machine.devices.gic.registers import (
    APR_WORDS,
    CPU_SLOTS,
    IDLE_PRIORITY,
    MAX_IRQS,
    SGIS,
    SPURIOUS,
    GicRegisters,
    Irq,
)
from sterna.stream.vmstate import (
    DeviceState,
    Field,
    StreamError,
    VmStateDescription,
    array,
    boolean,
    struct,
    u8,
    u16,
    u32,
)

_IRQ = VmStateDescription(
    "arm_gic_irq_state",
    version=1,
    fields=(
        *(u8(name) for name in ("enabled", "pending", "active", "level")),
        boolean("model"),
        boolean("edge_trigger"),
        u8("group"),
    ),
)


def _per_cpu(field: Field, words: int = 1) -> Field:
    return array(field, words * CPU_SLOTS)


ARM_GIC = VmStateDescription(
    "arm_gic",
    version=12,
    fields=(
        u32("ctlr"),
        _per_cpu(u32("cpu_ctlr")),
        array(struct("irq_state", _IRQ), MAX_IRQS),
        array(u8("irq_target"), MAX_IRQS),
        _per_cpu(u8("priority1"), GIC_SPI_BASE),
        array(u8("priority2"), MAX_IRQS - GIC_SPI_BASE),
        _per_cpu(u8("sgi_pending"), SGIS),
        *(_per_cpu(u16(name)) for name in ("priority_mask", "running_priority", "current_pending")),
        *(_per_cpu(u8(name)) for name in ("bpr", "abpr")),
        *(_per_cpu(u32(name), APR_WORDS) for name in ("apr", "nsapr")),
    ),
)

_DIRECT = ("cpu_ctlr", "priority_mask", "running_priority", "bpr", "abpr")
"""Lists per CPU that have the same name in the section and in the registers."""
_MATRICES = {
    "priority1": "private_priority",
    "sgi_pending": "sgi_sources",
    "apr": "apr",
    "nsapr": "nsapr",
}
"""Lists of lists per CPU, which the section has in one piece."""
_CTLR_LIMIT = 0x3
"""GICD_CTLR enables the two groups of interrupts (ARM IHI 0048B, 4.3.1)."""


def save_gic(registers: GicRegisters, current_pending: Sequence[int]) -> DeviceState:
    """The section of a GIC.

    With one CPU the target registers read as zero and it gets all interrupts (ARM IHI 0048B, 4.3.12); QEMU keeps that as
    targets that are all CPU 0.

    :param current_pending: the highest pending interrupt of each CPU that there is
    """
    only_cpu = len(current_pending) == 1
    fields: dict[str, Any] = {name: list(getattr(registers, name)) for name in _DIRECT}
    fields |= {name: list(chain(*getattr(registers, attribute))) for name, attribute in _MATRICES.items()}
    fields |= {
        "ctlr": registers.ctlr,
        "irq_state": [vars(irq).copy() for irq in registers.irqs],
        "irq_target": [1] * MAX_IRQS if only_cpu else list(registers.target),
        "priority2": list(registers.priority),
        "current_pending": [*current_pending, *[0] * (CPU_SLOTS - len(current_pending))],
    }
    return DeviceState(ARM_GIC.name, 0, ARM_GIC.version, fields)


def load_gic(state: DeviceState, cpus: int) -> GicRegisters:
    """A GIC's registers.

    :param cpus: number of CPUs; targets that a single one cannot read are not kept
    :raise StreamError: When a value is beyond what its register has room for.
    """
    fields = state.fields
    if fields["ctlr"] > _CTLR_LIMIT:
        raise StreamError(f"{fields['ctlr']:#x} is beyond {_CTLR_LIMIT:#x}", state.name).inside("ctlr")
    limits = {
        "priority_mask": 0xFF,
        "running_priority": IDLE_PRIORITY,
        "current_pending": SPURIOUS,
        "bpr": 7,
        "abpr": 7,
    }
    for name, limit in limits.items():
        for cpu, value in enumerate(fields[name]):
            if value > limit:
                raise StreamError(f"{value} is beyond {limit}", state.name).inside(f"{name}[{cpu}]")
    registers = GicRegisters(
        ctlr=fields["ctlr"],
        irqs=[Irq(**irq) for irq in fields["irq_state"]],
        target=[0] * MAX_IRQS if cpus == 1 else list(fields["irq_target"]),
        priority=list(fields["priority2"]),
    )
    for name in _DIRECT:
        setattr(registers, name, list(fields[name]))
    for name, attribute in _MATRICES.items():
        flat = fields[name]
        setattr(registers, attribute, [flat[i : i + CPU_SLOTS] for i in range(0, len(flat), CPU_SLOTS)])
    return registers
