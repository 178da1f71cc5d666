"""The wait for a guest: what its listener survives, and whom it turns away."""

import os
import resource
import socket
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from tests.migration.double import DoubleGuest
from tests.migration.pairs import TCP, hosts, waiting_guest

from sterna.migration import doubt
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.peer import Peer
from sterna.migration.statistics import MigrationStatus

COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED
PAGES = 3


@contextmanager
def no_descriptors_left() -> Iterator[None]:
    """This process can open nothing more: EMFILE."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    # The lowest free number is now beyond the limit; what is open stays open.
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> threading.Semaphore:
    """Counts the pauses that threads make."""
    made = threading.Semaphore(0)
    original = Cancellation.sleep

    def sleep(self: Cancellation, seconds: float) -> None:
        made.release()
        original(self, min(seconds, 0.01))

    monkeypatch.setattr(Cancellation, "sleep", sleep)
    return made


def ask(connection: socket.socket) -> bytes:
    connection.sendall(doubt.QUESTION + bytes(doubt.ID_BYTES))
    return connection.recv(8)


def test_a_listener_without_a_free_descriptor_goes_on_when_there_is_one(pauses: threading.Semaphore) -> None:
    with (
        hosts(waiting_guest()) as (there,),
        socket.socket() as connection,
    ):
        port = int(there.controller.incoming(TCP).rpartition(":")[2])
        with no_descriptors_left():
            connection.connect(("127.0.0.1", port))
            assert pauses.acquire(timeout=30)
            assert pauses.acquire(timeout=30), "it waits again for as long as it has to"
        connection.settimeout(30)
        assert ask(connection) == b"STRNANS1"
        assert there.controller.info().status is MigrationStatus.SETUP


def test_a_listener_that_fails_stays_until_the_source_has_confirmed(
    pauses: threading.Semaphore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Peer, "confirm", lambda self: None)
    with socket.create_server(("127.0.0.1", 0)) as server:
        # A socket that asked for its port itself keeps it when it is shut down.
        port = server.getsockname()[1]
    with hosts(DoubleGuest(PAGES, steps_per_ms=0), waiting_guest(PAGES)) as (here, there):
        uri = uris.parse(there.controller.incoming(f"tcp:127.0.0.1:{port}"))
        assert isinstance(uri, uris.ListeningUri)
        incoming = there.controller._incoming
        assert incoming is not None
        assert incoming._listener is not None
        sock = incoming._listener._socket
        original = there.guest.resume

        def resume() -> int:
            # COMMIT has arrived. A socket that was shut down accepts nothing: EINVAL.
            sock.shutdown(socket.SHUT_RDWR)
            assert pauses.acquire(timeout=10), "the listener was given up"
            sock.listen(16)
            return original()

        there.guest.resume = resume  # type: ignore[method-assign]
        info = here.migrate(str(uri))
        assert info.status is COMPLETED, info.error
        with Cancellation() as cancellation:
            outcome, _ = doubt.ask(uri, uuid.UUID(info.migration_id).bytes, 10, cancellation)
        assert outcome is doubt.Outcome.RUNNING


def test_a_listener_that_fails_before_any_guest_came_is_given_up() -> None:
    with hosts(waiting_guest(PAGES)) as (there,):
        there.controller.incoming(TCP)
        incoming = there.controller._incoming
        assert incoming is not None
        assert incoming._listener is not None
        incoming._listener._socket.shutdown(socket.SHUT_RDWR)
        info = there.outcome()
        assert info.status is FAILED
        assert info.error.endswith("invalid argument")
