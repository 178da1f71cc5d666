"""The virtio devices that a machine's user can ask for by name."""

import importlib
import pkgutil
from collections.abc import Callable

from sterna.machine.virtio import devices
from sterna.machine.virtio.device import Port, VirtioDevice


def names() -> tuple[str, ...]:
    """Those that there are: the modules of `devices/`, with hyphens in place of underscores."""
    return tuple(module.name.replace("_", "-") for module in pkgutil.iter_modules(devices.__path__))


def find(name: str) -> Callable[[Port], VirtioDevice]:
    """What makes such a device."""
    module = importlib.import_module(f"{devices.__name__}.{name.replace('-', '_')}")
    make: Callable[[Port], VirtioDevice] = module.DEVICE
    return make
