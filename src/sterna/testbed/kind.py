"""What a kind of VM is that scenarios can test, and those that run sterna's guest programs."""

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sterna.boards.virt import BOARD as VIRT
from sterna.guests.catalog import PROGRAMS, GuestError, find, validate
from sterna.hypervisor import interface as hypervisor
from sterna.hypervisor.accelerator import Isa, check_arch
from sterna.launch.command import qemu_arguments, sterna_arguments
from sterna.launch.errors import Unsupported, VmError
from sterna.launch.host import LOCAL, Host
from sterna.launch.process import QemuVm, SharedRam, SternaVm, Vm
from sterna.launch.qemu import Qemu, find_qemu
from sterna.machine.board import MAX_CPUS, Board, X86Board
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.nicconfig import NicConfig
from sterna.testbed.errors import BedError, ScenarioError
from sterna.testbed.guest import BareGuest, Guest
from sterna.testbed.network import GuestNic, Network
from sterna.testbed.session import SshSession
from sterna.testbed.settings import VmSettings


@dataclass(frozen=True)
class KindOptions:
    """What the user says about the VM under test.

    :ivar qemu: QEMU's program; None: the one in the path
    :ivar arguments: more arguments for every VM
    :ivar breakage: the fault that the emulated hypervisor is to have (`sterna.testing.breakages`); empty for none
    """

    qemu: str | None = None
    arguments: tuple[str, ...] = ()
    breakage: str = ""


class VmKind(ABC):
    """Makes the two ends of a migration.

    :ivar name: as on the command line
    :ivar verifies: whether both ends can compare RAM by themselves (x-sterna-verify)
    :ivar waits_again: whether a destination waits for another attempt after one has failed
    :ivar counts_pages: whether a source tells how often it has sent each page
    :ivar endless: parameters with which a migration of a guest at work goes on until it is told otherwise
    :ivar connected: whether every guest has a network card, where there can be one
    :ivar warm_up_seconds: the longest that a guest may take until it works at its steady pace
    :ivar note: what is known of the VM under test, for people; empty when nothing
    """

    name: str
    verifies: bool
    waits_again: bool
    counts_pages: bool
    endless: Mapping[str, Any] = MappingProxyType({"downtime-limit": 1})
    connected = False
    warm_up_seconds = 120.0
    note = ""

    def __init__(self, options: KindOptions = KindOptions()) -> None:
        self.options = options

    @abstractmethod
    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        """
        :param say: takes progress, for people
        :raise Unsupported: When this machine cannot run it.
        :raise BedError: When what it needs cannot be made.
        """

    def furnish(self, network: Network, directory: Path) -> AbstractContextManager[None]:
        """What its VMs need beside the hosts, for one bed at a time.

        :param directory: for files; it goes with the bed
        """
        return nullcontext()

    def check_session(self) -> None:
        """
        :raise Unsupported: When its guests have no ssh server, or this machine no client.
        """
        raise Unsupported(f"guests of the kind {self.name} have no ssh server")

    def session(self, client: Host, address: str, directory: Path) -> SshSession:
        """Open a session with a guest.

        :param client: where from
        :param address: the guest's
        :param directory: for files; it goes with the bed
        :raise Unsupported: As `check_session`.
        :raise BedError: When it does not open.
        """
        raise Unsupported(f"guests of the kind {self.name} have no ssh server")

    @abstractmethod
    def source(self, name: str, host: Host, settings: VmSettings, nic: GuestNic | None = None) -> Vm:
        """A VM with a guest.

        :param nic: its network card, whose tap is there on the host; None: it has none
        """

    @abstractmethod
    def destination(
        self,
        name: str,
        host: Host,
        settings: VmSettings,
        port: int,
        *,
        hold: bool,
        log: str | None = None,
        nic: GuestNic | None = None,
    ) -> Vm:
        """A VM that waits for a guest.

        :param port: where; 0 for any
        :param hold: do not run the guest until told to
        :param log: file for its console; None: read here
        :param nic: as of the source
        """

    def settle(self, vm: Vm) -> None:  # noqa: B027 - most need nothing
        """What is done to a VM once its guest works at its steady pace, before anything is measured.

        :raise BedError: When it cannot be done.
        """

    @abstractmethod
    def guest(self, settings: VmSettings) -> Guest:
        """How to ask the guest."""


class SternaKind(VmKind):
    """`sterna run`."""

    verifies = True
    waits_again = True
    counts_pages = True
    # Its own policy would slow the guest, and send what changed in a page, until it fits.
    endless = MappingProxyType({"downtime-limit": 0, "x-sterna-policy": "fixed"})

    def __init__(self, accel: str, options: KindOptions = KindOptions()) -> None:
        super().__init__(options)
        self.name = accel
        self._accel = accel
        self._start: Callable[[str, Sequence[str], Host], Vm] = SternaVm
        self._machine_accel = accel
        if options.breakage:
            from sterna.testing.breakages import LAUNCHER, accel_name

            self._start = partial(SternaVm, module=LAUNCHER)
            self._machine_accel = accel_name(options.breakage)
            self.note = f"the emulated hypervisor has a fault: {options.breakage}"

    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        if self._accel == "emulated":
            try:
                check_arch(self._accel, Isa.ARMV7)
            except hypervisor.Unsupported as error:
                raise Unsupported(str(error)) from error
            return
        if not os.path.exists("/dev/kvm"):
            raise Unsupported("this machine has no /dev/kvm")
        settings = VmSettings(memory="16M", program="clock")
        config = machine_config("trial", settings, accel=self._accel, kernel="clock", paused=True)
        with self._vm("trial", LOCAL, config) as vm:
            try:
                vm.ready()
            except VmError as error:
                raise Unsupported(str(error)) from error

    def source(self, name: str, host: Host, settings: VmSettings, nic: GuestNic | None = None) -> Vm:
        arguments = _arguments(settings, nic)
        _validate(settings, arguments, self._board())
        guest = {"kernel": settings.program, "append": arguments}
        return self._vm(name, host, machine_config(name, settings, nic, accel=self._accel, **guest))

    def destination(
        self,
        name: str,
        host: Host,
        settings: VmSettings,
        port: int,
        *,
        hold: bool,
        log: str | None = None,
        nic: GuestNic | None = None,
    ) -> Vm:
        config = machine_config(name, settings, nic, accel=self._accel, paused=hold)
        return self._vm(name, host, config, f"tcp:{host.address}:{port}", serial_line(log))

    def guest(self, settings: VmSettings) -> Guest:
        board = self._board()
        # KVM itself writes the CPUs' time records, when the destination restores its clock.
        written = (
            [range(board.time_record(0), board.time_record(MAX_CPUS))] if isinstance(board, X86Board) else []
        )
        return BareGuest(int(board.ram_base), settings.memory_bytes, written)

    def _board(self) -> Board:
        """The one that this hypervisor runs by default."""
        return MachineConfig(accel=self._accel).board

    def _vm(
        self, name: str, host: Host, config: MachineConfig, incoming: str | None = None, serial: str = ""
    ) -> Vm:
        accel, extra = self._machine_accel, self.options.arguments
        line = sterna_arguments(config, accel=accel, incoming=incoming, serial=serial, extra=extra)
        return self._start(name, line, host)


_PROBE_SECONDS = 30
_SOUND_QEMU = 9
"""The first QEMU whose TLBs learn that the migration has read and cleared the dirty bitmap 64 pages at a time. Before, a guest
on TCG goes on writing through entries that do not mark pages. RAM blocks that are no multiple of 64 pages are read page by page,
which is sound in all."""
_ODD_BYTES = 8192
"""What QEMU rounds sizes of RAM up to (-m), and no multiple of 64 pages."""
_TRICKLE = 1 << 16
"""Bytes per second: too few to end."""
_POLL_SECONDS = 0.01


class QemuKind(VmKind):
    """`qemu-system-arm` with the same guest programs."""

    name = "qemu"
    verifies = False
    waits_again = False
    counts_pages = False

    _odd_bytes = 0

    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        version = self._qemu.version
        if int(version.partition(".")[0]) < _SOUND_QEMU:
            self._odd_bytes = _ODD_BYTES
            self.note = (
                f"QEMU {version} loses writes of guests on TCG while they migrate, where RAM is a multiple of 256 KiB (QEMU "
                f"{_SOUND_QEMU}.0 does not): guests have {_ODD_BYTES >> 10} KiB more here, except where a scenario sets "
                "exact-memory to find that"
            )

    def source(self, name: str, host: Host, settings: VmSettings, nic: GuestNic | None = None) -> Vm:
        arguments = _arguments(settings, nic)
        _validate(settings, arguments, VIRT)
        guest = {"kernel": str(find(settings.program, VIRT.name)), "append": arguments}
        config = self._config(name, settings, nic, **guest)
        ram = SharedRam(VIRT.ram_name, config.memory_bytes) if settings.shared_ram else None
        line = qemu_arguments(config, ram=ram, extra=self.options.arguments)
        return QemuVm(name, self._binary(), line, host, ram)

    def destination(
        self,
        name: str,
        host: Host,
        settings: VmSettings,
        port: int,
        *,
        hold: bool,
        log: str | None = None,
        nic: GuestNic | None = None,
    ) -> Vm:
        config = self._config(name, settings, nic, paused=hold)
        incoming, extra = f"tcp:{host.address}:{port}", self.options.arguments
        line = qemu_arguments(config, incoming=incoming, serial=serial_line(log), extra=extra)
        return QemuVm(name, self._binary(), line, host)

    def settle(self, vm: Vm) -> None:
        """The first reading of a bitmap page by page, when all pages are marked, holds up the guest for long: have it done."""
        if not self._odd_bytes:
            return
        vm.command("migrate-set-parameters", **{"max-bandwidth": _TRICKLE, "downtime-limit": 1})
        vm.command("migrate", uri="exec:cat >/dev/null")
        _wait_status(vm, "active")
        vm.command("migrate_cancel")
        _wait_status(vm, "cancelled")

    def guest(self, settings: VmSettings) -> Guest:
        return BareGuest(int(VIRT.ram_base), self._memory_bytes(settings))

    def _memory_bytes(self, settings: VmSettings) -> int:
        """As the VM has it."""
        return settings.memory_bytes + (0 if settings.exact_memory else self._odd_bytes)

    def _config(self, name: str, settings: VmSettings, nic: GuestNic | None, **chosen: Any) -> MachineConfig:
        return machine_config(name, settings, nic, memory_bytes=self._memory_bytes(settings), **chosen)

    @cached_property
    def _qemu(self) -> Qemu:
        return find_qemu(self.options.qemu)

    def _binary(self) -> str:
        return self._qemu.path


def _wait_status(vm: Vm, wanted: str) -> None:
    """Wait until the VM's migration is so far."""
    deadline = time.monotonic() + _PROBE_SECONDS
    while (status := vm.command("query-migrate")["status"]) != wanted:
        if status in ("failed", "completed") or time.monotonic() > deadline:
            raise BedError(f"a trial migration of the {vm.name} is {status}, not {wanted}")
        time.sleep(_POLL_SECONDS)


def machine_config(
    name: str, settings: VmSettings, nic: GuestNic | None = None, **chosen: Any
) -> MachineConfig:
    """The machine of a VM under test.

    :param chosen: what else a `MachineConfig` has
    :raise VmError: When this host cannot have it.
    """
    nics = () if nic is None else (NicConfig(nic.tap, mac=bytes.fromhex(nic.mac.replace(":", ""))),)
    config = {"smp": settings.smp, "memory_bytes": settings.memory_bytes, "nics": nics, **chosen}
    try:
        return MachineConfig(**config)
    except ConfigError as error:
        raise VmError(f"the {name} did not start: {error}") from error


def serial_line(log: str | None) -> str:
    """Where a VM's console goes, for its command line: a file, or read here."""
    return "" if log is None else f"file:{log}"


def _arguments(settings: VmSettings, nic: GuestNic | None) -> str:
    """The guest program's arguments; the first of one that has a network card is its address."""
    program = PROGRAMS.get(settings.program)
    if program is None or not program.needs_nic:
        return settings.arguments
    if nic is None:
        raise ScenarioError(f"[vm] {settings.program} needs a network card; this procedure gives it none")
    return f"{nic.address} {settings.arguments}".strip()


def _validate(settings: VmSettings, arguments: str, board: Board) -> None:
    try:
        validate(
            settings.program,
            arguments,
            cpus=settings.smp,
            memory_bytes=settings.memory_bytes,
            board=board.name,
        )
    except GuestError as error:
        raise ScenarioError(f"[vm] {error}") from error
