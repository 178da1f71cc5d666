"""Which file a machine's kernel setting means."""

from pathlib import Path

from sterna.machine.config import MachineConfig
from sterna.machine.loader import Image, LoadError, read_image


def find(config: MachineConfig, device_tree_bytes: int) -> Image:
    """The image of the kernel that the settings name: a guest program that ships with the package, or a file.

    :raise GuestError: When the guest program cannot run with these settings.
    :raise LoadError: When the file cannot be loaded.
    """
    from sterna.guests import catalog

    name = config.kernel
    assert name is not None
    if name in catalog.PROGRAMS:
        catalog.validate(
            name, config.append, cpus=config.smp, memory_bytes=config.memory_bytes, board=config.machine
        )
        if catalog.PROGRAMS[name].needs_nic and not config.nics:
            raise catalog.GuestError(
                f"{name}: it needs a network card: --nic tap,ifname=tap0 (ip tuntap add tap0 mode tap makes one)"
            )
        path = catalog.find(name, config.machine)
    else:
        path = Path(name)
        if "/" not in name and not path.exists():
            known = ", ".join(catalog.PROGRAMS)
            raise LoadError(f"kernel {name}: neither a file nor a guest program (these are {known})")
    return read_image(path, config.board, config.memory_bytes, device_tree_bytes)
