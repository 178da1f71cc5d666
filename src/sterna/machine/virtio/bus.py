"""A board's row of virtio transports, and the devices behind them, made, run and migrated together."""

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from sterna.machine.board import TRANSPORT_BYTES, VirtioSlots
from sterna.machine.devices.device import Apply, Device, Region, SectionKey, Stopped, key_text
from sterna.machine.devices.irq import EDGE_RISING, SPI, IrqLine
from sterna.machine.devices.node import Node
from sterna.machine.virtio.mmio import WITHOUT_DEVICE, VirtioDevice, VirtioMmio
from sterna.machine.virtio.queue import GuestMemory, QueueError
from sterna.machine.virtio.section import layout, load_virtio, save_virtio
from sterna.memory.address import PAGE_SIZE
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription

DeviceT = TypeVar("DeviceT", bound=VirtioDevice)


class VirtioBus(Device):
    """The transports of one machine; most have no device behind them.

    :param line: gives the interrupt line of a number
    """

    chosen = True

    def __init__(self, slots: VirtioSlots, memory: GuestMemory, line: Callable[[int], IrqLine]) -> None:
        self._slots = slots
        self._memory = memory
        self._line = line
        self._transports: dict[int, VirtioMmio] = {}
        # By the name of the section.
        self._devices: dict[str, VirtioDevice] = {}
        self.descriptions: dict[str, VmStateDescription] = {}
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

    def add(self, make: Callable[[GuestMemory, IrqLine], DeviceT]) -> DeviceT:
        """Put a device behind the next transport; the bus closes it.

        :param make: makes it, from guest RAM and the transport's interrupt
        """
        slot = self._slots.slot_of(len(self._devices))
        device = make(self._memory, self._line(self._slots.irq(slot)))
        name = f"virtio-mmio@{self._slots.address(slot):016x}/{device.name}"
        self._devices[name] = device
        self._transports[slot] = device.transport
        self.descriptions[name] = layout(type(device))
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

    def pause(self) -> None:
        """No device touches guest RAM once this returns."""
        for device in self._devices.values():
            device.pause()

    def resume(self) -> None:
        """Let all work."""
        for device in self._devices.values():
            device.resume()

    def close(self) -> None:
        """Free what they have of the host's."""
        for device in reversed(self._devices.values()):
            device.close()

    def announce(self, delays: Sequence[float]) -> None:
        """The guest has come here."""
        for device in self._devices.values():
            device.announce(delays)

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """The devices' sections."""
        return [
            save_virtio(
                type(device), name, device.transport.save(), config=device.config(), own=device.save_own()
            )
            for name, device in self._devices.items()
        ]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check the devices' sections against guest RAM, which has arrived."""
        applies: list[Apply] = []
        for name, device in self._devices.items():
            applies += self._load(device, found[name, 0])

        def apply() -> None:
            for one in applies:
                one()

        return apply

    @staticmethod
    def _load(device: VirtioDevice, section: DeviceState) -> tuple[Apply, Apply]:
        state = load_virtio(type(device), section)
        try:
            device.transport.check(state)
        except QueueError as error:
            raise StreamError(str(error), section.name) from error
        return device.load_own(section.fields["virtio"]), lambda: device.transport.load(state)

    def missing(self, key: SectionKey) -> StreamError:
        """Says which device it is of."""
        what, option = self._devices[key[0]].asked_for
        return StreamError(f"the section is missing; this machine has {what} there ({option})", key[0])

    def surplus(self, key: SectionKey) -> StreamError:
        """A transport has one device."""
        return StreamError("the section comes twice", key_text(key))
