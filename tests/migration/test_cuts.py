"""The connection is cut at every byte, in both directions: exactly one of the two runs the guest afterwards."""

import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from tests.migration.pairs import TCP, Host, hosts
from tests.migration.proxy import Fault, Proxy

from sterna.migration.handshake import GREETING, PrivateMessage
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.stream import sections
from sterna.stream.return_path import pong
from sterna.stream.wire import Command
from sterna.testing.guest import DoubleGuest

PAGES = 3
ROOT = Path(__file__).parents[2]


def still_guest() -> DoubleGuest:
    """A guest that runs and has written one page, and writes no more: its streams are short and all alike."""
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    guest.advance_steps(1)
    return guest


class Pair:
    """A source and a destination, renewed when the guest has moved."""

    def __init__(self) -> None:
        self.moved = 0
        self.failed = 0
        self._open()

    def _open(self) -> None:
        self._hosts = hosts(still_guest(), DoubleGuest(PAGES, running=False))
        self.here, self.there = self._hosts.__enter__()
        # One pass, whatever is predicted: all streams are of one length.
        one_pass = {"x-sterna-policy": "fixed", "downtime-limit": 2_000_000}
        self.here.controller.set_parameters(
            {**one_pass, "max-bandwidth": 0, "x-sterna-doubt-timeout": 20_000}
        )
        self.address = self.there.controller.incoming(TCP)

    def close(self) -> None:
        self._hosts.__exit__(None, None, None)

    def attempt(self, fault: Fault) -> tuple[MigrationInfo, Proxy]:
        """Migrate through a proxy with a fault, and check who runs."""
        before = len(self.there.events)
        with Proxy(int(self.address.rpartition(":")[2]), fault) as proxy:
            info = self.here.migrate(proxy.uri)
            # The source has its answer before its own last bytes have passed.
            proxy.wait_end()
        if len(self.there.events) > before:
            self.there.controller.wait(30)
        check_ownership(self.here, self.there, info, fault)
        if info.status is MigrationStatus.COMPLETED:
            self.moved += 1
            self.close()
            self._open()
        else:
            self.failed += 1
        return info, proxy


def check_ownership(here: Host, there: Host, info: MigrationInfo, fault: Fault) -> None:
    owner = there if info.status is MigrationStatus.COMPLETED else here
    assert here.guest.running == (owner is here), (fault, info)
    assert there.guest.running == (owner is there), (fault, info, there.controller.info())
    assert not here.guest.logging
    assert not info.in_doubt, (fault, info)
    owner.guest.check_ram()
    if owner is here:
        assert info.error, fault
        assert "Error" not in info.error, info.error


@contextmanager
def pair() -> Iterator[Pair]:
    made = Pair()
    try:
        yield made
    finally:
        made.close()


def lengths() -> list[int]:
    """Bytes that a migration without a fault takes, forward and backward."""
    with pair() as fresh:
        info, proxy = fresh.attempt(Fault())
        assert info.status is MigrationStatus.COMPLETED
        return proxy.forwarded


def positions(total: int) -> list[int]:
    """Every position, but within the data of the one page that is sent only some."""
    page = range(300, 300 + 4000)
    return [at for at in range(total + 1) if at not in page or at % 131 == 0]


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True])
def test_cut_at_every_byte_to_the_destination(reset: bool) -> None:
    total = lengths()[0]
    with pair() as hosts_:
        # Each position in one of the two ways.
        for at in positions(total)[int(reset) :: 2]:
            hosts_.attempt(Fault(forward=at, reset=reset))
        assert hosts_.failed > 200
        assert 0 < hosts_.moved < 60, "only the cuts of the last message let the guest move"
        info, _ = hosts_.attempt(Fault())
        assert info.status is MigrationStatus.COMPLETED, "a migration right after all these failures succeeds"


@pytest.mark.slow
@pytest.mark.parametrize("reset", [False, True])
def test_cut_at_every_byte_to_the_source(reset: bool) -> None:
    total = lengths()[1]
    with pair() as hosts_:
        for at in range(total + 1):
            hosts_.attempt(Fault(backward=at, reset=reset))
        assert hosts_.failed > 100
        assert hosts_.moved > 20, "whoever lost RUNNING asks again and learns that the guest moved"


def test_who_cannot_be_asked_leaves_the_guest_paused() -> None:
    with hosts(still_guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 300})
        address = there.controller.incoming(TCP)
        # All but the last byte of RUNNING arrives, and then nothing more gets through.
        fault = Fault(cut_message=PrivateMessage.RUNNING, mute=True)
        with Proxy(int(address.rpartition(":")[2]), fault) as proxy:
            info = here.migrate(proxy.uri)
        assert (info.status, info.in_doubt) == (MigrationStatus.FAILED, True)
        assert "'cont -f'" in info.error
        assert "'quit'" in info.error
        assert there.guest.running
        assert not here.guest.running, "never both"
        assert here.guest.left_in_doubt
        assert not here.guest.logging


@contextmanager
def destination_process(die_at: str) -> Iterator[str]:
    """A destination in a process of its own that dies without a word when the guest's method `die_at` is
    called.
    """
    command = [sys.executable, "-m", "tests.migration.mortal", str(PAGES), die_at]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("die_at", ["load_devices", "advance_counter", "resume"])
def test_a_destination_that_dies_gives_the_guest_back(die_at: str) -> None:
    with hosts(still_guest()) as (here,), destination_process(die_at) as address:
        info = here.migrate(address)
        assert info.status is MigrationStatus.FAILED
        assert not info.in_doubt, info.error
        assert here.guest.running
        assert not here.guest.logging
        with hosts(DoubleGuest(PAGES, running=False)) as (there,):
            assert here.migrate(there.controller.incoming(TCP)).status is MigrationStatus.COMPLETED


def silent_qemu(
    listener: socket.socket, asked: threading.Event, answer: threading.Event, has_all: threading.Event
) -> None:
    """Answers pings as QEMU does, takes everything, and never says that the guest runs.

    :param asked: set when a ping has come that is not the greeting
    :param answer: such a ping is not answered before it is set
    :param has_all: set when the stream's end has come
    """
    connection, _ = listener.accept()
    # The source may have gone when it is answered.
    with connection, suppress(OSError):
        taken, pings = b"", deque([GREETING, *range(1, 1000)])
        while data := connection.recv(1 << 16):
            taken += data
            while sections.command(Command.PING, pings[0].to_bytes(4, "big")) in taken:
                if pings[0] != GREETING:
                    asked.set()
                    answer.wait()
                connection.sendall(pong(pings.popleft()).encode())
            if taken.endswith(b"}") and b"vmsd_name" in taken:
                has_all.set()


@contextmanager
def to_a_silent_qemu() -> Iterator[tuple[Host, threading.Event, threading.Event, threading.Event]]:
    """A source that migrates there, and the three events."""
    asked, answer, has_all = threading.Event(), threading.Event(), threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=silent_qemu, args=(listener, asked, answer, has_all), daemon=True)
        thread.start()
        with hosts(still_guest(), DoubleGuest(PAGES, running=False)) as (here, _):
            here.controller.set_parameters({"x-sterna-doubt-timeout": 300})
            here.controller.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
            try:
                yield here, asked, answer, has_all
            finally:
                answer.set()
        thread.join()


def test_the_guest_runs_until_the_destination_has_taken_a_pass_in() -> None:
    """Else what is still under way, or waits there for memory, would be waited for while the guest stands still."""
    with to_a_silent_qemu() as (here, asked, *_):
        assert asked.wait(30)
        info = here.controller.info()
        assert (info.status, info.remaining, here.guest.running) == (MigrationStatus.ACTIVE, 0, True)
        here.controller.cancel()
        assert here.outcome().status is MigrationStatus.CANCELLED


def test_a_silent_qemu_does_not_hold_the_migration_for_ever() -> None:
    with to_a_silent_qemu() as (here, _, answer, has_all):
        answer.set()
        assert has_all.wait(30)
        here.expire()
        info = here.outcome()
        assert (info.status, info.in_doubt) == (MigrationStatus.FAILED, True)
        assert "'cont -f'" in info.error
        assert here.guest.left_in_doubt
        assert not here.guest.running
