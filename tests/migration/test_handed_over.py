"""What fails when the guest has changed hands: it is told, and it is no failure of the migration."""

import errno
import gc
import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from tests.migration.machinehost import MachineHost
from tests.migration.pairs import TCP, assert_one_runs, hosts, source_guest, waiting_guest
from tests.refusal import refuse_threads

from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.machine.runstate import RunState
from sterna.migration.channels import exec as channels_exec
from sterna.migration.peer import Peer
from sterna.migration.process import ProcessWatch
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import NotTheOwner, OwnershipState
from sterna.stream import sections
from sterna.stream.vmstate import DeviceState, VmStateDescription, u8
from sterna.testing.guest import DoubleGuest

COMPLETED = MigrationStatus.COMPLETED


class Refusing(MigratableMachine):
    """A machine whose host has no memory when its dirty log is to be switched off for the first time."""

    refused = False

    def stop_dirty_logging(self) -> None:
        if not self.refused:
            self.refused = True
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        super().stop_dirty_logging()


@contextmanager
def machine_host(
    kind: type[MigratableMachine] = MigratableMachine, *, incoming: bool = False
) -> Iterator[MachineHost]:
    config = MachineConfig(
        memory_bytes=32 << 20, serial="memory", kernel=None if incoming else "clock", incoming=incoming
    )
    host = MachineHost(Machine(config), kind)
    try:
        yield host
    finally:
        host.close()


@pytest.mark.parametrize(
    ("uri", "state"),
    [
        (TCP, OwnershipState.AWAY),
        ("file:{0}/saved", OwnershipState.SAVED),
        ("exec:cat > {0}/piped", OwnershipState.HANDED_ON),
    ],
)
def test_a_log_that_cannot_be_stopped_does_not_say_that_the_guest_is_here(
    uri: str, state: OwnershipState, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with machine_host(Refusing) as here, machine_host(incoming=True) as there:
        here.machine.cont()
        info = here.migrate(there.controller.incoming(uri) if uri is TCP else uri.format(tmp_path))
        assert (info.status, info.error) == (COMPLETED, "")
        assert here.guest.refused  # type: ignore[attr-defined]
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
            "its throttle and dirty log cannot be ended after the guest has left: Cannot allocate memory"
        ]
        assert (here.machine.run_state, here.guest.ownership.state) == (RunState.POSTMIGRATE, state)
        if state is OwnershipState.SAVED:
            here.machine.cont()
            assert here.machine.run_state is RunState.RUNNING
        else:
            with pytest.raises(NotTheOwner):
                here.machine.cont()
        if state is OwnershipState.AWAY:
            assert there.outcome().status is COMPLETED
            assert there.machine.run_state is RunState.RUNNING


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


# -- a command ---------------------------------------------------------------------------------------------------------

BIG = VmStateDescription("big", 1, tuple(u8(f"field-{number}") for number in range(200)))
"""A device whose description does not fit in a pipe of one page."""


class BigGuest(DoubleGuest):
    def __init__(self) -> None:
        super().__init__(3, steps_per_ms=0)
        self.descriptions |= {"big": BIG}

    def save_devices(self) -> list[DeviceState]:
        return [*super().save_devices(), DeviceState("big", 0, 1, {field.name: 0 for field in BIG.fields})]


@pytest.fixture
def narrow_pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(channels_exec, "_PIPE_BYTES", 4096)
    yield
    gc.collect()  # of a process that nobody has waited for Python warns here, and in no other test


def bytes_before_the_end(tmp_path: Path) -> int:
    with hosts(BigGuest()) as (here,):
        assert here.migrate(f"exec:cat > {tmp_path}/whole").status is COMPLETED
    stream = (tmp_path / "whole").read_bytes()
    at = stream.index(b'{"')
    end = sections.end_of_stream() + sections.vm_description(stream[at:])
    assert stream.endswith(end)
    assert len(end) > 4096
    return len(stream) - len(end)


@pytest.mark.parametrize(("beyond", "thread"), [(-1, True), (1, True), (1, False)])
@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")
def test_a_command_that_took_a_byte_of_the_end_is_not_killed(
    beyond: int, thread: bool, tmp_path: Path, narrow_pipe: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To a QEMU behind it one byte is enough to start the guest. What has not read all before the end cannot have it.

    :param beyond: how many bytes of the end it takes
    :param thread: whether the host has one, to take the command's exit status whenever that comes
    """
    size = bytes_before_the_end(tmp_path) + beyond
    told = tmp_path / "told"
    os.mkfifo(told)
    if not thread:
        refuse_threads(monkeypatch, "exec-exit")
    with hosts(BigGuest()) as (here,):
        here.controller.migrate(f"exec:head -c {size} > /dev/null; echo $$ > {told}; exec sleep 1000")
        pid = int(told.read_text())
        with closing(ProcessWatch(os.pidfd_open(pid))) as command:
            here.controller.cancel()
            info = here.outcome()
            if beyond < 0:
                assert info.status is MigrationStatus.CANCELLED
                assert command.ended
                assert here.guest.running
                return
            assert (info.status, info.in_doubt) == (MigrationStatus.FAILED, True)
            assert (
                "while the stream's end was sent; the guest stays paused here and may run at exec:"
                in info.error
            )
            assert not command.ended
            waiting = [thread for thread in threading.enumerate() if thread.name == "exec-exit"]
            assert bool(waiting) is thread
            os.kill(pid, signal.SIGKILL)
            for exit_ in waiting:
                exit_.join(30)
