"""What a GICv2 holds: the registers of the distributor and the CPU interfaces (ARM IHI 0048B), as they migrate."""

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from sterna.machine.board import GIC_SPI_BASE

MAX_IRQS = 1020
CPU_SLOTS = 8
"""CPUs that the register layout has room for."""
ALL_CPUS = 0xFF
SGIS = 16
SPURIOUS = 1023
IDLE_PRIORITY = 0x100
APR_WORDS = 4
MINIMUM_ABPR = 1


class Distributor(IntEnum):
    """Offsets in the distributor (table 4-1). Each name up to the next is a range."""

    CTLR = 0x000
    TYPER = 0x004
    IIDR = 0x008
    IGROUPR = 0x080
    ISENABLER = 0x100
    ICENABLER = 0x180
    ISPENDR = 0x200
    ICPENDR = 0x280
    ISACTIVER = 0x300
    ICACTIVER = 0x380
    IPRIORITYR = 0x400
    ITARGETSR = 0x800
    ICFGR = 0xC00
    NSACR = 0xD00
    SGIR = 0xF00
    CPENDSGIR = 0xF10
    SPENDSGIR = 0xF20
    RESERVED = 0xF30
    IDENTIFICATION = 0xFD0


class CpuInterface(IntEnum):
    """Offsets in a CPU interface (table 4-2)."""

    CTLR = 0x00
    PMR = 0x04
    BPR = 0x08
    IAR = 0x0C
    EOIR = 0x10
    RPR = 0x14
    HPPIR = 0x18
    ABPR = 0x1C
    APR = 0xD0
    IIDR = 0xFC


@dataclass
class Irq:
    """One interrupt. Masks have a bit per CPU; shared interrupts set all of them.

    :ivar level: the input line
    :ivar model: the low bit of its ICFGR field, which GICv2 gives no meaning
    """

    enabled: int = 0
    pending: int = 0
    active: int = 0
    level: int = 0
    model: bool = False
    edge_trigger: bool = False
    group: int = 0


def _sgis() -> list[Irq]:
    """All interrupts after a reset: SGIs are always enabled and edge triggered (4.3.5, 4.3.13)."""
    return [
        Irq(enabled=ALL_CPUS, edge_trigger=True) if number < SGIS else Irq() for number in range(MAX_IRQS)
    ]


@dataclass
class GicRegisters:
    """All that a guest can find in a GIC; what migrates. Lists per CPU have `CPU_SLOTS` entries.

    :ivar target: CPU masks of the shared interrupts
    :ivar private_priority: priorities of the first 32 interrupts, by interrupt and CPU
    :ivar priority: priorities of all others, by interrupt minus 32
    :ivar sgi_sources: by SGI and target CPU, the mask of CPUs that sent it
    :ivar apr: active priorities, by word and CPU: one bit per priority level
    """

    ctlr: int = 0
    cpu_ctlr: list[int] = field(default_factory=lambda: [0] * CPU_SLOTS)
    irqs: list[Irq] = field(default_factory=_sgis)
    target: list[int] = field(default_factory=lambda: [0] * MAX_IRQS)
    private_priority: list[list[int]] = field(
        default_factory=lambda: [[0] * CPU_SLOTS for _ in range(GIC_SPI_BASE)]
    )
    priority: list[int] = field(default_factory=lambda: [0] * (MAX_IRQS - GIC_SPI_BASE))
    sgi_sources: list[list[int]] = field(default_factory=lambda: [[0] * CPU_SLOTS for _ in range(SGIS)])
    priority_mask: list[int] = field(default_factory=lambda: [0] * CPU_SLOTS)
    running_priority: list[int] = field(default_factory=lambda: [0] * CPU_SLOTS)
    bpr: list[int] = field(default_factory=lambda: [0] * CPU_SLOTS)
    abpr: list[int] = field(default_factory=lambda: [0] * CPU_SLOTS)
    apr: list[list[int]] = field(default_factory=lambda: [[0] * CPU_SLOTS for _ in range(APR_WORDS)])
    nsapr: list[list[int]] = field(default_factory=lambda: [[0] * CPU_SLOTS for _ in range(APR_WORDS)])

    def copy(self) -> "GicRegisters":
        """A copy that shares nothing. (The guest is down meanwhile: `copy.deepcopy` would take it 10 ms.)"""
        rows = ("private_priority", "sgi_sources", "apr", "nsapr")
        copied: dict[str, Any] = {name: [row.copy() for row in getattr(self, name)] for name in rows}
        for name, value in vars(self).items():
            if name not in rows and name != "irqs":
                copied[name] = value.copy() if isinstance(value, list) else value
        return GicRegisters(irqs=[Irq(**vars(irq)) for irq in self.irqs], **copied)

    @staticmethod
    def reset(cpus: int) -> "GicRegisters":
        """The state after a reset of a GIC with so many CPUs."""
        registers = GicRegisters()
        for cpu in range(cpus):
            registers.running_priority[cpu] = IDLE_PRIORITY
            registers.abpr[cpu] = MINIMUM_ABPR
        return registers
