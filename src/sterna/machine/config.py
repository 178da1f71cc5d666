"""What a machine's user chooses, checked."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from uuid import UUID

from sterna.host.limits import most_bytes
from sterna.host.units import parse_size
from sterna.hypervisor.accelerator import ACCELERATORS
from sterna.hypervisor.interface import DirtyLogMode
from sterna.machine.board import BOARDS, DEVICE_TREE_ROOM, MAX_CPUS, Board
from sterna.machine.errors import MachineError
from sterna.machine.nicconfig import NicConfig, default_mac
from sterna.machine.serial import SerialError, check_serial
from sterna.machine.virtio.catalog import DEVICES
from sterna.memory.address import PAGE_SIZE
from sterna.registry import Registry

MEBIBYTE = 1 << 20
_SIZE = re.compile(r"\d[\d.]*[BKMGT]?", re.ASCII | re.IGNORECASE)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}", re.ASCII)
MAX_APPEND_BYTES = 4096
SMALLEST_MEMORY = 2 * DEVICE_TREE_ROOM


class ConfigError(MachineError):
    """A machine cannot be made as asked; the text names the setting, the value and what is allowed."""


@dataclass(frozen=True)
class MachineConfig:
    """A machine's settings.

    :ivar machine: the board, ``virt``, ``vexpress-a15``, ``virt-arm64`` or ``pc-min``; empty for the one that goes with the
        hypervisor
    :ivar cpu: the CPU model; empty for the first that this hypervisor has for the board
    :ivar smp: number of CPUs
    :ivar memory_bytes: size of RAM
    :ivar accel: the hypervisor, ``emulated``, ``kvm`` or what else is registered (`sterna.hypervisor.accelerator.ACCELERATORS`)
    :ivar dirty_log: how the hypervisor keeps its dirty log, ``bitmap``, ``manual`` or ``ring``
    :ivar kernel: name of a guest that ships with sterna, or path of an ELF file; None for an incoming machine, or RAM that
        starts empty
    :ivar append: the kernel's arguments
    :ivar serial: where the first UART goes: ``stdio``, ``file:PATH``, ``unix:PATH``, ``memory`` or ``null``
    :ivar nics: network cards; one without a MAC gets the one that goes with its number
    :ivar devices: names of virtio devices besides (`sterna.machine.virtio.catalog.DEVICES`)
    :ivar preallocated: the host gives all of RAM at once, not when it is touched
    :ivar paused: do not run the guest until told to
    :ivar incoming: wait for a migration; nothing is loaded into RAM
    :ivar name: the machine's name, for people
    :ivar uuid: what tells the machine from others; None when it has none

    :raise ConfigError: When a setting is not possible.
    """

    machine: str = ""
    cpu: str = ""
    smp: int = 1
    memory_bytes: int = 128 * MEBIBYTE
    accel: str = "emulated"
    dirty_log: str = DirtyLogMode.BITMAP
    kernel: str | None = None
    append: str = ""
    serial: str = "null"
    nics: tuple[NicConfig, ...] = ()
    devices: tuple[str, ...] = ()
    preallocated: bool = False
    paused: bool = False
    incoming: bool = False
    name: str = ""
    uuid: UUID | None = None

    def __post_init__(self) -> None:
        _choice("accel", self.accel, ACCELERATORS)
        accel = ACCELERATORS.get(self.accel)
        object.__setattr__(self, "machine", self.machine or accel.board)
        _choice("machine", self.machine, BOARDS)
        object.__setattr__(self, "cpu", self.cpu or next(iter(self.cpus)))
        _choice("cpu", self.cpu, tuple(self.cpus))
        _choice("dirty log", self.dirty_log, tuple(DirtyLogMode))
        if DirtyLogMode(self.dirty_log) not in accel.dirty_logs:
            kind = "dirty rings" if self.dirty_log == DirtyLogMode.RING else f"log {self.dirty_log}"
            raise ConfigError(
                f"dirty log: the {self.accel} hypervisor has no {kind}; choose {' or '.join(accel.dirty_logs)}"
            )
        if not 1 <= self.smp <= MAX_CPUS:
            raise ConfigError(f"smp: {self.smp} CPUs asked for, the board has 1 to {MAX_CPUS}")
        check_memory(self.memory_bytes, self.board)
        check_append(self.append)
        try:
            check_serial(self.serial)
        except SerialError as error:
            raise ConfigError(str(error)) from error
        object.__setattr__(self, "nics", _check_nics(self.nics, self.board))
        _check_devices(self.devices, len(self.nics), self.board)
        if self.kernel is not None and not self.kernel:
            raise ConfigError("kernel: the name is empty")

    @property
    def target(self) -> str:
        """The guest's architecture by QEMU's name (SysEmuTarget)."""
        return self.board.architecture.target

    @property
    def cpus(self) -> Mapping[str, str]:
        """The CPU models that it may have, the default first: what each is compatible with in a device tree."""
        return ACCELERATORS.get(self.accel).cpus(self.board.architecture)

    @property
    def board(self) -> Board:
        """The description of the board."""
        return BOARDS.get(self.machine)


def parse_memory(text: str) -> int:
    """A memory size in bytes from a number and a unit as QEMU takes them: ``1792M``, ``2G``, ``1.5G``; without a unit, MiB.

    :raise ConfigError: When the text is not a size.
    """
    try:
        if _SIZE.fullmatch(text.strip()):
            return parse_size(text, default_unit="m")
    except ValueError:
        pass
    shown = repr(text) if len(text) <= 24 else f"{text[:24]!r}..."
    raise ConfigError(f"memory: {shown} is not a size; write a number and B, K, M, G or T, such as 1792M")


def parse_uuid(text: str) -> UUID:
    """A UUID from the 32 hexadecimal digits and 4 hyphens that QEMU takes.

    :raise ConfigError: When the text is none.
    """
    if _UUID.fullmatch(text) is None:
        raise ConfigError(f"uuid: {text:.60} is not 32 hexadecimal digits as 8-4-4-4-12")
    return UUID(text)


def check_memory(size: int, board: Board) -> None:
    """Check that the board and this host can have so much RAM.

    :raise ConfigError: When they cannot.
    """
    if size <= 0:
        raise ConfigError(f"memory: {size} bytes is not a size of RAM")
    if size % PAGE_SIZE:
        raise ConfigError(f"memory: {size} bytes is not a multiple of {PAGE_SIZE} bytes")
    if size < SMALLEST_MEMORY:
        raise ConfigError(
            f"memory: {size} bytes is less than the {SMALLEST_MEMORY >> 20} MiB that a guest needs"
        )
    if size > board.ram_limit:
        raise ConfigError(
            f"memory: {size >> 20} MiB is too much for board {board.name}: its RAM starts at {board.ram_base:#x} and "
            f"ends below 4 GiB, so at most {board.ram_limit >> 20} MiB"
        )
    most = most_bytes()
    if most is not None and size > most.size:
        raise ConfigError(f"memory: {size >> 20} MiB is more than the {most.size >> 20} MiB of {most.by}")


def check_append(text: str) -> None:
    """Check that the kernel's arguments can stand in a device tree: printable ASCII, not too long.

    :raise ConfigError: When they cannot.
    """
    if len(text) > MAX_APPEND_BYTES:
        raise ConfigError(
            f"append: {len(text)} characters are more than the {MAX_APPEND_BYTES} a guest takes"
        )
    for i, character in enumerate(text):
        if not " " <= character <= "~":
            raise ConfigError(
                f"append: character {i + 1} is {character!r}; kernel arguments are printable ASCII"
            )


def _check_nics(nics: Sequence[NicConfig], board: Board) -> tuple[NicConfig, ...]:
    """The cards, each with its MAC.

    :raise ConfigError: When there are too many, or two cannot be told apart.
    """
    if len(nics) > board.virtio.count:
        raise ConfigError(
            f"nic: {len(nics)} cards asked for, board {board.name} has room for {board.virtio.count}"
        )
    complete = tuple(
        nic if nic.mac is not None else replace(nic, mac=default_mac(number))
        for number, nic in enumerate(nics)
    )
    for index, nic in enumerate(complete):
        for other in complete[:index]:
            if nic.tap == other.tap:
                raise ConfigError(f"nic: two cards want the tap {nic.tap}")
            if nic.mac == other.mac:
                assert nic.mac is not None
                raise ConfigError(f"nic: two cards have the MAC {nic.mac.hex(':')}")
    return complete


def _check_devices(devices: Sequence[str], cards: int, board: Board) -> None:
    """Check that there are such devices, and room for them.

    :raise ConfigError: When not.
    """
    for name in devices:
        _choice("device", name, DEVICES)
    if cards + len(devices) > board.virtio.count:
        raise ConfigError(
            f"device: {len(devices)} asked for besides {cards} network cards, board {board.name} has room for "
            f"{board.virtio.count} in all"
        )


def _choice(setting: str, value: str, choices: Registry[Any] | tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"{setting}: {value!r} is not known; choose {' or '.join(choices)}")
