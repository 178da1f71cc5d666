"""What a board is: where its memory and devices are. Those with ARM CPUs have what QEMU's boards of the same names have."""

from collections.abc import Sequence
from dataclasses import dataclass

from sterna.hypervisor.architecture import ARCHITECTURES, Architecture
from sterna.memory.address import Ipa
from sterna.registry import Registry

GIC_SPI_BASE = 32
"""Interrupts below are private to a CPU: 16 software-generated ones (SGI), then 16 of its own devices (PPI)."""
VIRTUAL_TIMER_IRQ = 27
"""The virtual timer's PPI (ARM DDI 0438, 8.2.3)."""
MAX_CPUS = 4
TRANSPORT_BYTES = 0x200
"""From one virtio-mmio transport to the next."""
ADDRESS_LIMIT = 1 << 32
"""A 32-bit guest without LPAE sees nothing beyond."""
DEVICE_TREE_ROOM = 1 << 20
"""The device tree is at the start of RAM and ends below this offset."""


@dataclass(frozen=True)
class Uart:
    """A PL011.

    :ivar spi: its interrupt, counted from the first shared one
    """

    base: Ipa
    spi: int

    @property
    def irq(self) -> int:
        """Its interrupt's number at the GIC."""
        return GIC_SPI_BASE + self.spi


@dataclass(frozen=True)
class Gic:
    """A GICv2.

    :ivar distributor: address of the distributor
    :ivar cpu_interface: address of the CPU interfaces (each CPU sees its own there)
    :ivar irqs: number of interrupts, private ones included
    """

    distributor: Ipa
    distributor_bytes: int
    cpu_interface: Ipa
    cpu_interface_bytes: int
    irqs: int


@dataclass(frozen=True)
class VirtioSlots:
    """A row of virtio-mmio transports.

    :ivar count: how many there are
    :ivar spi: the first one's interrupt, counted from the first shared one
    """

    base: Ipa
    count: int
    spi: int

    def address(self, slot: int) -> Ipa:
        """Where a transport is."""
        return Ipa(self.base + slot * TRANSPORT_BYTES)

    def irq(self, slot: int) -> int:
        """Its interrupt's number at the GIC."""
        return GIC_SPI_BASE + self.spi + slot

    def slot_of(self, number: int) -> int:
        """The transport of device `number`: the last first, as QEMU fills them."""
        return self.count - 1 - number


@dataclass(frozen=True)
class Board:
    """What a machine is made of, apart from what its user chooses.

    :ivar name: as the user says it
    :ivar arch: of its CPUs, one of `ARCHITECTURES`
    :ivar machine_type: the name in a migration stream's configuration section
    :ivar page_bits: log2 of the page size that the configuration section names, or None if it names none
    :ivar ram_name: the RAM block's name in a migration stream
    :ivar uarts: the first is the console
    :ivar virtio: where virtio devices go
    :ivar model: the device tree's `model` and `compatible`
    :ivar ram_end: RAM ends below
    """

    name: str
    arch: str
    machine_type: str
    page_bits: int | None
    ram_base: Ipa
    ram_name: str
    uarts: tuple[Uart, ...]
    virtio: VirtioSlots
    model: str
    compatible: tuple[str, ...]
    ram_end: int = ADDRESS_LIMIT

    @property
    def architecture(self) -> Architecture:
        """What its CPUs are."""
        return ARCHITECTURES.get(self.arch)

    @property
    def ram_limit(self) -> int:
        """The most RAM that fits, in bytes."""
        return self.ram_end - self.ram_base

    @property
    def secondaries_off(self) -> bool:
        """Whether all CPUs but the first wait until the guest starts them."""
        return False

    @property
    def written_by_host(self) -> Sequence[range]:
        """Addresses that the hypervisor itself writes to, when a guest goes on at its destination."""
        return ()

    def reserved_bytes(self, device_tree_bytes: int) -> int:
        """How much of RAM, from its start, a kernel must leave alone."""
        return device_tree_bytes


BOARDS: Registry[Board] = Registry("sterna.boards", "sterna.boards", "BOARD")
