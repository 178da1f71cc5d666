"""What fails when the guest has changed hands: it is told, and it is no failure of the migration."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.migration.pairs import TCP, Host, assert_one_runs, hosts, source_guest, waiting_guest

from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.runstate import RunState
from sterna.migration.peer import Peer
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import NotTheOwner, Standing

COMPLETED = MigrationStatus.COMPLETED


class Refusing(Machine):
    """A machine whose host has no memory when its dirty log is to be switched off for the first time."""

    refused = False

    def stop_dirty_logging(self) -> None:
        if not self.refused:
            self.refused = True
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        super().stop_dirty_logging()


@contextmanager
def machine_host(kind: type[Machine], *, incoming: bool = False) -> Iterator[Host]:
    config = MachineConfig(
        memory_bytes=32 << 20, serial="memory", kernel=None if incoming else "clock", incoming=incoming
    )
    host = Host(kind(config))  # type: ignore[arg-type]
    try:
        yield host
    finally:
        host.close()


@pytest.mark.parametrize(
    ("uri", "standing"),
    [
        (TCP, Standing.AWAY),
        ("file:{0}/saved", Standing.SAVED),
        ("exec:cat > {0}/piped", Standing.HANDED_ON),
    ],
)
def test_a_log_that_cannot_be_stopped_does_not_say_that_the_guest_is_here(
    uri: str, standing: Standing, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with machine_host(Refusing) as here, machine_host(Machine, incoming=True) as there:
        here.guest.cont()
        info = here.migrate(there.controller.incoming(uri) if uri is TCP else uri.format(tmp_path))
        assert (info.status, info.error) == (COMPLETED, "")
        assert here.guest.refused
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
            "its throttle and dirty log cannot be ended after the guest has left: Cannot allocate memory"
        ]
        assert (here.guest.run_state, here.guest.ownership.standing) == (RunState.POSTMIGRATE, standing)
        if standing is Standing.SAVED:
            here.guest.cont()
            assert here.guest.run_state is RunState.RUNNING
        else:
            with pytest.raises(NotTheOwner):
                here.guest.cont()
        if standing is Standing.AWAY:
            assert there.outcome().status is COMPLETED
            assert there.guest.run_state is RunState.RUNNING


def test_whatever_fails_once_the_destination_has_said_that_it_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(peer: Peer) -> None:
        raise MemoryError("no room for three words")

    monkeypatch.setattr(Peer, "confirm", fail)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        info = here.migrate(there.controller.incoming(TCP))
        assert (info.status, info.error) == (COMPLETED, "")
        assert "after the guest has left: this host has no memory left: no room" in caplog.text
        assert assert_one_runs(here.guest, there.guest) is there.guest
        assert here.guest.away


def test_whatever_fails_in_doubt_it_is_said_who_may_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(peer: Peer) -> None:
        raise MemoryError("no room for an answer")

    monkeypatch.setattr(Peer, "wait_running", fail)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        info = here.migrate(address)
        assert (info.status, info.in_doubt) == (MigrationStatus.FAILED, True)
        assert "no room for an answer; the guest stays paused here and may run at" in info.error
        assert not here.guest.logging
        there.wait_status(COMPLETED)
        assert here.controller.resolve_doubt() == "the guest runs at the destination"
        assert assert_one_runs(here.guest, there.guest) is there.guest
