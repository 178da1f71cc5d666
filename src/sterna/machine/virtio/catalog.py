"""The virtio devices that a machine's user can ask for by name."""

from collections.abc import Callable

from sterna.machine.virtio.device import Port, VirtioDevice
from sterna.registry import Registry

DEVICES: Registry[Callable[[Port], VirtioDevice]] = Registry(
    "sterna.devices", "sterna.machine.virtio.devices", "DEVICE"
)
"""What makes each."""
