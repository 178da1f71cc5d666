"""A virtio device as its machine has it: behind a transport, with a section."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from sterna.machine.devices.device import Apply, Device, SectionKey, Stopped, key_text, nothing
from sterna.machine.devices.irq import IrqLine
from sterna.machine.virtio.kind import Kind
from sterna.machine.virtio.mmio import VirtioMmio
from sterna.machine.virtio.queue import GuestMemory, QueueError
from sterna.machine.virtio.section import layout, load_virtio, save_virtio
from sterna.stream.vmstate import DeviceState, StreamError


@dataclass(frozen=True)
class Port:
    """What a bus has for a device.

    :ivar address: the transport's
    :ivar memory: guest RAM
    :ivar irq: the transport's interrupt
    """

    address: int
    memory: GuestMemory
    irq: IrqLine


class VirtioDevice(Device, ABC):
    """One device and its transport. All that it writes to guest RAM goes through its queues, and so into the dirty log.

    :cvar kind: what it is
    :ivar transport: what the guest accesses
    """

    kind: ClassVar[Kind]
    chosen = True

    def __init__(self, port: Port) -> None:
        self.transport = VirtioMmio(self.kind, port.memory, port.irq, self.config, self.notify)
        self._section = f"virtio-mmio@{port.address:016x}/{self.kind.name}"
        self.descriptions = {self._section: layout(self.kind)}

    @property
    @abstractmethod
    def asked_for(self) -> tuple[str, str]:
        """What it is, and by which option its user has it, for people."""

    def config(self) -> bytes:
        """Its configuration space. Called with the transport's lock held."""
        return b""

    @abstractmethod
    def notify(self) -> None:
        """The driver has set its status, offered buffers, or reset the device. Called with the transport's lock held; must not
        wait.
        """

    def save_own(self) -> dict[str, Any]:
        """The values of its kind's own fields."""
        return {}

    def load_own(self, fields: Mapping[str, Any]) -> Apply:
        """Check the values of its kind's own fields: what puts them into the device.

        :raise StreamError: When the device cannot have them.
        """
        return nothing

    def save(self, stopped: Stopped) -> list[DeviceState]:
        """Its section."""
        state = self.transport.save()
        return [save_virtio(self.kind, self._section, state, config=self.config(), own=self.save_own())]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check its section against guest RAM, which has arrived."""
        section = found[self._section, 0]
        state = load_virtio(self.kind, section)
        try:
            self.transport.check(state)
        except QueueError as error:
            raise StreamError(str(error), section.name) from error
        load_own = self.load_own(section.fields["virtio"])

        def apply() -> None:
            load_own()
            self.transport.load(state)

        return apply

    def missing(self, key: SectionKey) -> StreamError:
        """Says what the user has asked for."""
        what, option = self.asked_for
        return StreamError(f"the section is missing; this machine has {what} there ({option})", key[0])

    def surplus(self, key: SectionKey) -> StreamError:
        """A transport has one device."""
        return StreamError("the section comes twice", key_text(key))
