"""What a kind of VM is that scenarios can test, and what those that run sterna's guest programs share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sterna.guests.catalog import PROGRAMS, GuestError, validate
from sterna.launch.errors import Unsupported, VmError
from sterna.launch.host import Host
from sterna.launch.process import VmProcess
from sterna.machine.board import Board
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.nicconfig import NicConfig
from sterna.testbed.errors import ScenarioError
from sterna.testbed.guest import ObservedGuest
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
    :ivar accel: the hypervisor of ours whose kernels its VMs call; empty when they call none
    :ivar connected: whether every guest has a network card, where there can be one
    :ivar warm_up_seconds: the longest that a guest may take until it works at its steady pace
    :ivar note: what is known of the VM under test, for people; empty when nothing
    """

    name: str
    verifies: bool
    waits_again: bool
    counts_pages: bool
    endless: Mapping[str, Any] = MappingProxyType({"downtime-limit": 1})
    accel = ""
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

    def set_up(self, network: Network, directory: Path) -> AbstractContextManager[None]:
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

    def source(self, name: str, host: Host, settings: VmSettings, nic: GuestNic | None = None) -> VmProcess:
        """A VM with a guest.

        :param nic: its network card, whose tap is there on the host; None: it has none
        """
        boots = self._kernel(settings, nic)
        return self._start_vm(name, host, settings, self._config(name, settings, nic, **boots))

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
    ) -> VmProcess:
        """A VM that waits for a guest.

        :param port: where; 0 for any
        :param hold: do not run the guest until told to
        :param log: file for its console; None: read here
        :param nic: as of the source
        """
        config = self._config(name, settings, nic, paused=hold)
        incoming, serial = f"tcp:{host.address}:{port}", "" if log is None else f"file:{log}"
        return self._start_vm(name, host, settings, config, incoming=incoming, serial=serial)

    @abstractmethod
    def _kernel(self, settings: VmSettings, nic: GuestNic | None) -> Mapping[str, str]:
        """What a source boots: `kernel` and `append` of its `MachineConfig`.

        :raise ScenarioError: When there can be no such guest.
        """

    def _config(
        self, name: str, settings: VmSettings, nic: GuestNic | None = None, **chosen: Any
    ) -> MachineConfig:
        """The machine of a VM.

        :param chosen: what else a `MachineConfig` has
        :raise VmError: When this host cannot have it.
        """
        nics = () if nic is None else (NicConfig(nic.tap, mac=bytes.fromhex(nic.mac.replace(":", ""))),)
        config = {"smp": settings.smp, "memory_bytes": settings.memory_bytes, "nics": nics, **chosen}
        try:
            return MachineConfig(**config)
        except ConfigError as error:
            raise VmError(f"the {name} did not start: {error}") from error

    @abstractmethod
    def _start_vm(
        self, name: str, host: Host, settings: VmSettings, config: MachineConfig, **line: Any
    ) -> VmProcess:
        """:param line: `incoming` and `serial`, as `sterna.launch.command` takes them, of a VM that waits for a guest"""

    def settle(self, vm: VmProcess) -> None:  # noqa: B027 - most need nothing
        """What is done to a VM once its guest works at its steady pace, before anything is measured.

        :raise BedError: When it cannot be done.
        """

    @abstractmethod
    def guest(self, settings: VmSettings) -> ObservedGuest:
        """How to ask the guest."""


def checked_arguments(settings: VmSettings, nic: GuestNic | None, board: Board) -> str:
    """The guest program's arguments; the first of one that has a network card is its address.

    :raise ScenarioError: When it does not take them.
    """
    arguments = settings.arguments
    if (program := PROGRAMS.get(settings.program)) is not None and program.needs_nic:
        if nic is None:
            raise ScenarioError(f"[vm] {settings.program} needs a network card; this procedure gives it none")
        arguments = f"{nic.address} {arguments}".strip()
    limits = {"cpus": settings.smp, "memory_bytes": settings.memory_bytes}
    try:
        validate(settings.program, arguments, **limits, board=board.name)
    except GuestError as error:
        raise ScenarioError(f"[vm] {error}") from error
    return arguments
