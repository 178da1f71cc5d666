"""What all virtio devices of one kind have alike."""

from collections.abc import Sequence
from dataclasses import dataclass

from sterna.stream.vmstate import Field


@dataclass(frozen=True)
class Kind:
    """A kind of virtio device.

    :ivar name: its own in the name of its section, as in QEMU
    :ivar device_id: its type (Virtual I/O Device Version 1.1, clause 5)
    :ivar queue_limits: the most entries of each of its queues
    :ivar features: what it offers, VERSION_1 apart
    :ivar version: its section's
    :ivar fields: its own in its section, behind those that all virtio devices have
    :ivar hidden_queues: the most entries of further queues, which QEMU's device has and this one does not offer
    """

    name: str
    device_id: int
    queue_limits: Sequence[int]
    features: int = 0
    version: int = 1
    fields: Sequence[Field] = ()
    hidden_queues: Sequence[int] = ()
