"""A board's row of virtio transports, most of which have no device behind them."""

from collections.abc import Callable
from typing import TypeVar

from sterna.machine.board import TRANSPORT_BYTES, VirtioSlots
from sterna.machine.devices.device import Device, Region
from sterna.machine.devices.irq import EDGE_RISING, SPI, IrqLine
from sterna.machine.devices.node import Node
from sterna.machine.virtio.device import Port, VirtioDevice
from sterna.machine.virtio.mmio import WITHOUT_DEVICE, VirtioMmio
from sterna.machine.virtio.queue import GuestMemory
from sterna.memory.address import PAGE_SIZE

DeviceT = TypeVar("DeviceT", bound=VirtioDevice)


class VirtioBus(Device):
    """The transports of one machine.

    :param line: gives the interrupt line of a number
    """

    def __init__(self, slots: VirtioSlots, memory: GuestMemory, line: Callable[[int], IrqLine]) -> None:
        self._slots = slots
        self._memory = memory
        self._line = line
        self._transports: dict[int, VirtioMmio] = {}
        size = slots.address(slots.count) - slots.base
        self.regions = (Region(slots.base, -(-size // PAGE_SIZE) * PAGE_SIZE, self),)

    @staticmethod
    def write_nodes(root: Node, slots: VirtioSlots, count: int) -> None:
        """The nodes of so many devices' transports. What is behind one, the guest asks the transport."""
        for slot in map(slots.slot_of, range(count)):
            node = root.child(f"virtio_mmio@{slots.address(slot):x}")
            node.strings("compatible", "virtio,mmio")
            node.registers((slots.address(slot), TRANSPORT_BYTES))
            if root.wired:
                node.words("interrupts", SPI, slots.spi + slot, EDGE_RISING)
                node.flag("dma-coherent")

    def add(self, make: Callable[[Port], DeviceT]) -> DeviceT:
        """Put a device behind the next transport.

        :param make: makes it
        """
        slot = self._slots.slot_of(len(self._transports))
        device = make(Port(self._slots.address(slot), self._memory, self._line(self._slots.irq(slot))))
        self._transports[slot] = device.transport
        return device

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """A register of a transport; one without a device says just that."""
        number, register = divmod(offset, TRANSPORT_BYTES)
        transport = self._transports.get(number)
        return transport.mmio_read(register, size, cpu) if transport else WITHOUT_DEVICE.get(register, 0)

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """Set a register of a transport."""
        number, register = divmod(offset, TRANSPORT_BYTES)
        if transport := self._transports.get(number):
            transport.mmio_write(register, size, value, cpu)
