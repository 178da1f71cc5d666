"""The virtio devices that a machine's user can ask for by name."""

import importlib
import pkgutil
from collections.abc import Callable

from sterna.machine.devices.irq import IrqLine
from sterna.machine.virtio import devices
from sterna.machine.virtio.mmio import VirtioDevice
from sterna.machine.virtio.queue import GuestMemory


def names() -> tuple[str, ...]:
    """Those that there are: the modules of `devices/`, with hyphens in place of underscores."""
    return tuple(module.name.replace("_", "-") for module in pkgutil.iter_modules(devices.__path__))


def find(name: str) -> Callable[[GuestMemory, IrqLine], VirtioDevice]:
    """What makes such a device, from guest RAM and its transport's interrupt."""
    module = importlib.import_module(f"{devices.__name__}.{name.replace('-', '_')}")
    make: Callable[[GuestMemory, IrqLine], VirtioDevice] = module.DEVICE
    return make
