"""The command lines of virtual machines: what a machine's settings are in the words of `sterna run`, and in QEMU's."""

from collections.abc import Sequence

from sterna.launch.process import SharedRam
from sterna.machine.config import MachineConfig


def sterna_arguments(
    config: MachineConfig,
    *,
    accel: str = "",
    incoming: str | None = None,
    serial: str = "",
    extra: Sequence[str] = (),
) -> list[str]:
    """What `SternaVm` takes.

    :param accel: the hypervisor, by a name that only the program to be started knows; empty: the config's
    :param incoming: where to wait for a guest; None: the config's kernel is loaded
    :param serial: where the first serial line goes; empty: to the VM's `console`
    :param extra: the user's own, which take precedence over the machine's
    """
    line = ["--machine", config.machine]
    if config.cpu != next(iter(config.cpus)):
        line += ["--cpu", config.cpu]
    line += ["--smp", str(config.smp), "--memory", f"{config.memory_bytes}B"]
    line += ["--accel", accel or config.accel, "--dirty-log", config.dirty_log]
    for nic in config.nics:
        tap = f"fd={nic.fd}" if nic.fd is not None else f"ifname={nic.ifname}"
        line += ["--nic", f"tap,{tap},mac={_mac(nic.mac)}"]
    for name in config.devices:
        line += ["--device", name]
    return [*line, *_alike("--", "paused", config, incoming, serial, extra)]


def qemu_arguments(
    config: MachineConfig,
    *,
    incoming: str | None = None,
    serial: str = "",
    ram: SharedRam | None = None,
    extra: Sequence[str] = (),
) -> list[str]:
    """What `QemuVm` takes; as `sterna_arguments`. The kernel is the path of an image.

    :param ram: the file that is its RAM; None: memory of its own
    """
    line = ["-M", config.machine, "-cpu", config.cpu, "-smp", str(config.smp)]
    if ram is not None:
        # The RAM block's name, which the destination has to have as well, is the backend's.
        file = f"id={ram.block},size={config.memory_bytes},mem-path={ram.path},share=on"
        line += ["-object", f"memory-backend-file,{file}", "-machine", f"memory-backend={ram.block}"]
    for number, nic in enumerate(config.nics):
        tap = f"fd={nic.fd}" if nic.fd is not None else f"ifname={nic.ifname},script=no,downscript=no"
        line += ["-netdev", f"tap,id=net{number},{tap}"]
        line += ["-device", f"virtio-net-device,netdev=net{number},mac={_mac(nic.mac)}"]
    for name in config.devices:
        line += ["-device", f"{name}-device"]
    if config.nics or config.devices:
        # The guest programs know virtio 1, not what came before.
        line += ["-global", "virtio-mmio.force-legacy=false"]
    line += ["-m", f"{config.memory_bytes >> 10}K"]
    return [*line, *_alike("-", "S", config, incoming, serial, extra)]


def _alike(
    dash: str, paused: str, config: MachineConfig, incoming: str | None, serial: str, extra: Sequence[str]
) -> list[str]:
    """What both have the same words for."""
    line = [] if config.uuid is None else [f"{dash}uuid", str(config.uuid)]
    line += [f"{dash}mem-prealloc"] if config.preallocated else []
    line += extra
    if incoming is not None:
        line += [f"{dash}incoming", incoming]
    elif config.kernel is not None:
        line += [f"{dash}kernel", config.kernel, f"{dash}append", config.append]
    line += [f"{dash}{paused}"] if config.paused else []
    return [*line, f"{dash}serial", serial] if serial else line


def _mac(mac: bytes | None) -> str:
    assert mac is not None  # a config has given each card its own
    return mac.hex(":")
