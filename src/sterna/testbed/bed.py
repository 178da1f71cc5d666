"""One scenario's hosts, VMs and files, all gone at its end."""

import contextlib
import itertools
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sterna.host.closing import Closing
from sterna.host.load import HostWatch
from sterna.launch.errors import WaitedTooLong
from sterna.launch.guestview import runs_beyond
from sterna.launch.host import Host
from sterna.launch.process import VmProcess
from sterna.launch.signals import ENDING
from sterna.launch.watch import wait_for
from sterna.testbed.errors import BedError
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.journal import Journal
from sterna.testbed.kind import VmKind
from sterna.testbed.network import GuestNic, Network, guest_nic, make_network
from sterna.testbed.settings import MigrationSettings, VmSettings

PORT = 4321
"""Where destinations listen, each at the next one; on the loopback address wherever there is room."""
POLL_SECONDS = 0.02
_RUNS_SECONDS = 5.0
T = TypeVar("T")


@dataclass(frozen=True)
class ScenarioContext:
    """What a procedure plays on."""

    bed: "Bed"
    vm: VmSettings
    migration: MigrationSettings

    @property
    def guest(self) -> ObservedGuest:
        """How its guests are asked."""
        return self.bed.kind.guest(self.vm)


class Bed(Closing):
    """A context manager.

    :ivar kind: of VM under test
    :ivar began: CLOCK_MONOTONIC
    :ivar watch: of the host, since then
    :ivar directory: for files that go with it

    :param rate: of every link, bytes per second; 0 is no limit
    :param say: takes progress, for people
    """

    def __init__(self, kind: VmKind, rate: int, say: Callable[[str], None] = lambda text: None) -> None:
        self.kind = kind
        self.say = say
        self.began = time.monotonic()
        self.watch = HostWatch()
        self._stack = contextlib.ExitStack()
        self._ports = itertools.count(PORT)
        self._cards: dict[str, GuestNic] = {}
        with self._stack as stack:
            self.journal = stack.enter_context(Journal(say=say))
            self.directory: Path = self.journal.make_directory()
            self.network: Network = stack.enter_context(make_network(rate))
            stack.enter_context(kind.set_up(self.network, self.directory))
            self._stack = stack.pop_all()
        if self.network.note:
            say(self.network.note)

    @property
    def hosts(self) -> tuple[Host, Host]:
        return self.network.hosts

    def now(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def other(self, host: Host) -> Host:
        """The host that `host` is not."""
        return self.hosts[1] if host.name == self.hosts[0].name else self.hosts[0]

    def source(
        self,
        settings: VmSettings,
        host: Host | None = None,
        name: str = "guest",
        *,
        nic: GuestNic | None = None,
    ) -> VmProcess:
        """A VM with a guest, started; not waited for."""
        host = host or self.hosts[0]
        nic = self._attach(host, name, nic)
        vm = self.kind.source(f"{name} on {host.name}", host, settings, nic)
        return self._stack.enter_context(vm)

    def destination(
        self,
        settings: VmSettings,
        host: Host | None = None,
        name: str = "guest",
        *,
        hold: bool = False,
        log: str | None = None,
        nic: GuestNic | None = None,
    ) -> VmProcess:
        """A VM that waits for a guest, started; not waited for."""
        host = host or self.hosts[1]
        nic = self._attach(host, name, nic)
        port = next(self._ports) if host.namespace is not None else 0
        vm = self.kind.destination(
            f"{name} on {host.name}", host, settings, port, hold=hold, log=log, nic=nic
        )
        return self._stack.enter_context(vm)

    def warm_up(self, vm: VmProcess, guest: ObservedGuest) -> None:
        """Wait until the VM's guest works at its steady pace."""
        vm.ready()
        problem = f"the guest of the {vm.name} did not touch all its memory"
        try:
            self.wait(lambda: guest.warmed_up(vm), self.kind.warm_up_seconds, problem)
        except WaitedTooLong as error:
            raise BedError(f"{error}{guest.last_words(vm)}") from error
        self.kind.settle(vm)

    def wait(
        self,
        ask: Callable[[], T | None],
        seconds: float,
        otherwise: str,
        poll_seconds: float = POLL_SECONDS,
    ) -> T:
        """As `sterna.launch.watch.wait_for`.

        :raise WaitedTooLong: When there is no answer in time.
        """
        return wait_for(ask, seconds, otherwise, self.watch, poll_seconds=poll_seconds)

    def see_it_run(self, vm: VmProcess, guest: ObservedGuest) -> None:
        """
        :raise WaitedTooLong: When the VM's guest stands still.
        """
        last = guest.mark(vm)
        self.wait(lambda: runs_beyond(last, guest.mark(vm)), _RUNS_SECONDS, "it stands still")

    def _attach(self, host: Host, name: str, nic: GuestNic | None) -> GuestNic | None:
        """The card of a guest, with its tap on the host."""
        if nic is None and self.kind.connected and host.namespace is not None:
            nic = self._cards.setdefault(name, guest_nic(len(self._cards)))
        if nic is not None:
            self.network.attach(host, nic)
        return nic

    def close(self) -> None:
        """End and remove everything. A signal waits until that is done."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
        try:
            self._stack.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
