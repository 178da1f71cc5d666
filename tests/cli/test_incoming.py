"""`sterna run --incoming`: what it says on standard error, whoever connects and whoever reads."""

import contextlib
import fcntl
import logging
import os
import signal
import socket
from pathlib import Path

import pytest
from tests.cli.vms import TIMEOUT, children, vm, wait_for

from sterna.cli.stderrlog import StderrLog
from sterna.host.ratelimitedlog import RateLimitedLog
from sterna.stream import sections
from sterna.stream.sections import Configuration

pytestmark = pytest.mark.slow

WAITING = ("--incoming", "tcp:127.0.0.1:0", "--serial", "null")
GUEST = ("--kernel", "clock", "--append", "20", "--serial", "null")
CONNECTIONS = 1000


def connect(uri: str, data: bytes) -> None:
    """Send so much and wait until the connection ends."""
    host, port = uri.removeprefix("tcp:").rsplit(":", 1)
    with (
        socket.create_connection((host, int(port)), TIMEOUT) as peer,
        contextlib.suppress(OSError),  # it may end before it has read all of that
    ):
        peer.sendall(data)
        peer.shutdown(socket.SHUT_WR)
        assert peer.recv(1) == b""


@pytest.mark.parametrize(
    ("data", "kinds"),
    [
        # No guest comes in, and is not said to.
        (b"12345678\n", {"incoming migration"}),
        # Also what is logged: that the guest has a UUID, and this machine has none.
        (
            sections.header(Configuration("virt-7.2", 12, uuid=b"u" * 16)),
            {"incoming migration", "a guest comes in", "UUID is received"},
        ),
    ],
)
def test_no_peer_fills_the_log(tmp_path: Path, data: bytes, kinds: set[str]) -> None:
    with vm(tmp_path, "vm", *WAITING) as machine:
        uri = machine.incoming_uri()
        for _ in range(CONNECTIONS):
            connect(uri, data)
        wait_for(lambda: machine.qmp.command("query-migrate")["status"] == "failed")
        _, *lines = machine.errors().splitlines()
        said = [next(kind for kind in kinds if kind in line) for line in lines]
        assert set(said) == kinds
        assert max(map(said.count, kinds)) <= 24
        assert " more since this was told last)" in lines[-1]


@pytest.mark.parametrize("uri", ["file:{}", "exec:cat {}; exec sleep 1000", "fd:0"])
def test_what_comes_one_way_is_told_and_nobody_is_waited_for(tmp_path: Path, uri: str) -> None:
    """Whoever sends a guest may have more to do afterwards: the guest runs once it is here."""
    stream = tmp_path / "stream"
    with vm(tmp_path, "source", *GUEST) as source:
        source.qmp.command("migrate", uri=f"file:{stream}")
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "completed")
    uri = uri.format(stream)
    with vm(tmp_path, "vm", "--incoming", uri, "--serial", "null") as machine:
        wait_for(lambda: machine.errors() == f"sterna: waiting for a guest from {uri}\n" or uri != "fd:0")
        assert machine.process.stdin is not None
        if uri == "fd:0":
            machine.process.stdin.write(stream.read_bytes())
            machine.process.stdin.flush()
        wait_for(lambda: machine.qmp.command("query-migrate").get("status") == "completed")
        wait_for(lambda: "is here" in machine.errors())
        waiting, *comes, here = machine.errors().splitlines()
        assert waiting == f"sterna: waiting for a guest from {uri}"
        # What was there before anybody was told is told in one line.
        assert comes in ([], [f"sterna: a guest comes in from {uri}"])
        assert here == f"sterna: the guest from {uri} is here: running"
        [*left] = children(machine.process.pid)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert len(left) == uri.startswith("exec:"), "it may go on"
        wait_for(lambda: not children(machine.process.pid))  # somebody takes its exit status


def test_standard_error_that_nobody_reads_holds_nothing_up(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.write(writes, bytes(fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)))
    with (
        vm(tmp_path, "destination", *WAITING, stderr=writes) as destination,
        vm(tmp_path, "source", *GUEST) as source,
    ):
        uri = destination.incoming_uri()
        for _ in range(10):
            connect(uri, b"12345678\n")
        source.qmp.command("migrate", uri=uri)
        wait_for(lambda: source.qmp.command("query-migrate")["status"] in ("completed", "failed"))
        assert destination.running()
        os.read(reads, 4096)
        destination.qmp.command("quit")
        assert destination.process.wait(TIMEOUT) == 0
    os.close(reads)
    os.close(writes)


def test_what_could_not_be_written_is_counted() -> None:
    reads, writes = os.pipe()
    room = fcntl.fcntl(writes, fcntl.F_SETPIPE_SZ, 4096)
    stderr_log = StderrLog(writes)
    stderr_log.tell("first\nand \x1b last", lines=True)
    os.write(writes, bytes(room - len(b"sterna: first\nand \\x1b last\n")))
    for _ in range(3):
        stderr_log.tell("lost")
    assert os.read(reads, room).rstrip(b"\0") == b"sterna: first\nand \\x1b last\n"
    stderr_log.tell("here")
    assert os.read(reads, room) == b"sterna: 3 messages could not be written here\nsterna: here\n"
    stderr_log.handle(
        logging.makeLogRecord({"msg": "%s logged", "args": ("also\n",), "levelno": logging.ERROR})
    )
    assert os.read(reads, room) == b"sterna: also\\n logged\n"
    os.close(reads)
    stderr_log.tell("nobody reads it")
    os.close(writes)


@pytest.mark.parametrize(
    ("freely", "expected"), [(1, [1, 2, 4, 8, 16]), (3, [1, 2, 3, 6, 12]), (8, [*range(1, 9), 16])]
)
def test_complaints_become_rare(freely: int, expected: list[int]) -> None:
    told: list[str] = []
    limited = RateLimitedLog(told.append, freely)
    for number in range(1, 20):
        limited.tell(f"{number}")
    assert [int(text.split()[0]) for text in told] == expected
    left_out = [here - before - 1 for before, here in zip([0, *expected], expected, strict=False)]
    assert [text.partition(" ")[2] for text in told] == [
        f"({count} more since this was told last)" if count else "" for count in left_out
    ]
