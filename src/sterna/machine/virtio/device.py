"""What a virtio device is to its machine: a transport, a section, a way to stand still."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sterna.machine.devices.device import Apply, nothing
from sterna.machine.devices.irq import IrqLine
from sterna.machine.virtio.mmio import VirtioMmio
from sterna.machine.virtio.queue import GuestMemory
from sterna.stream.vmstate import Field


class BusDevice:
    """A virtio device that a bus can have. Its methods for the transport are those of `VirtioDevice`.

    All that it writes to guest RAM goes through its queues' memory, and so into the dirty log.

    :cvar name: the device's in the name of its section, as in QEMU
    :cvar version: its section's
    :cvar fields: its own in its section, behind those that all virtio devices have
    :cvar hidden_queues: the most entries of further queues, which QEMU's device has and this one does not offer
    :ivar transport: what the guest accesses

    :param memory: guest RAM
    :param irq: the transport's interrupt
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    fields: ClassVar[Sequence[Field]] = ()
    hidden_queues: ClassVar[Sequence[int]] = ()
    device_id: int
    features: int = 0
    queue_limits: tuple[int, ...]

    def __init__(self, memory: GuestMemory, irq: IrqLine) -> None:
        self.transport = VirtioMmio(self, memory, irq)

    @property
    def asked_for(self) -> tuple[str, str]:
        """What it is, and by which option its user has it, for people."""
        raise NotImplementedError

    def config(self) -> bytes:
        """Its configuration space."""
        return b""

    def notify(self) -> None:
        """The driver has set its status, offered buffers, or reset the device. Must not wait."""
        raise NotImplementedError

    def pause(self) -> None:
        """Once this returns it does not touch guest RAM."""

    def resume(self) -> None:
        """Work again."""

    def close(self) -> None:
        """Free what it has of the host's."""

    def announce(self, delays: Sequence[float]) -> None:
        """The guest has come here; as `Device.announce`."""

    def save_own(self) -> dict[str, Any]:
        """The values of `fields`."""
        return {}

    def load_own(self, fields: Mapping[str, Any]) -> Apply:
        """Check the values of `fields`: what puts them into the device.

        :raise StreamError: When the device cannot have them.
        """
        return nothing
