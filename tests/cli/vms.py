"""Machines in processes of their own."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sterna.guests.layout import STATUS_BYTES, STATUS_OFFSET, DirtyramWord, StatusError, read_status
from sterna.launch.command import sterna_arguments
from sterna.machine.config import MachineConfig
from sterna.monitor.addresses import parse_address
from sterna.monitor.client import QmpClient

TIMEOUT = 300.0


class Vm:
    """A `sterna run` with QMP at `address`.

    :param stderr: a descriptor for its standard error; by default that is kept, for `errors`
    """

    def __init__(self, directory: Path, name: str, *arguments: str, stderr: int | None = None) -> None:
        self.address = f"unix:{directory}/{name}.qmp"
        self._errors = (directory / f"{name}.stderr").open("w+b")
        machine = sterna_arguments(MachineConfig(memory_bytes=16 << 20), extra=arguments)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sterna", "run", "--qmp", f"{self.address},server", *machine],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors if stderr is None else stderr,
        )
        self.qmp: QmpClient

    def connect(self) -> None:
        """Wait until its monitor answers."""
        path = Path(self.address.removeprefix("unix:"))
        wait_for(lambda: path.is_socket() or self.process.poll() is not None)
        assert self.process.poll() is None, self.errors()
        wait_for(self._try_connect)

    def _try_connect(self) -> bool:
        try:
            self.qmp = QmpClient.connect(parse_address(self.address), TIMEOUT)
        except Exception:
            assert self.process.poll() is None, self.errors()
            return False
        return True

    def incoming_uri(self) -> str:
        """Where it waits for a guest."""
        [address] = self.qmp.command("query-migrate")["socket-address"]
        return f"tcp:{address['host']}:{address['port']}"

    def errors(self) -> str:
        """Its standard error so far."""
        self._errors.seek(0)
        return self._errors.read().decode()

    def running(self) -> bool:
        """Whether the guest runs."""
        return bool(self.qmp.command("query-status")["running"])

    def passes(self) -> int:
        """How often the first CPU of its guest, `dirtyram`, has written all its pages."""
        fd = os.memfd_create("status")
        with open(fd, "rb") as file:
            at = int(MachineConfig().board.ram_base) + STATUS_OFFSET
            name = f"/proc/{os.getpid()}/fd/{fd}"
            self.qmp.command("pmemsave", val=at, size=STATUS_BYTES, filename=name)
            try:
                status = read_status(file.read())
            except StatusError:
                return 0  # it has not come that far
        return status.word(0, DirtyramWord.PASSES) if status.cpus else 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait(TIMEOUT)
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            assert stream is not None
            stream.close()
        if hasattr(self, "qmp"):
            self.qmp.close()


@contextmanager
def vm(directory: Path, name: str, *arguments: str, stderr: int | None = None) -> Iterator[Vm]:
    """A machine that answers."""
    machine = Vm(directory, name, *arguments, stderr=stderr)
    try:
        machine.connect()
        yield machine
    finally:
        machine.close()


@contextmanager
def pair(directory: Path) -> Iterator[tuple[Vm, Vm]]:
    """A guest that writes to memory, and a machine that waits for it."""
    source = Vm(directory, "source", "--kernel", "dirtyram", "--append", "500 10 5", "--serial", "null")
    destination = Vm(directory, "destination", "--incoming", "tcp:127.0.0.1:0", "--serial", "null")
    try:
        source.connect()
        destination.connect()
        yield source, destination
    finally:
        source.close()
        destination.close()


def wait_for(condition, seconds: float = TIMEOUT) -> None:
    """Poll until the condition holds.

    :raise AssertionError: When it does not in time.
    """
    deadline = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        pause.wait(0.02)


def children(pid: int) -> set[int]:
    """Processes whose parent is `pid`."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.add(int(stat.parent.name))
    return found


def alive(pid: int) -> bool:
    """Whether a process runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except OSError:
        return False


def interrupt(process: "subprocess.Popen[bytes] | subprocess.Popen[str]") -> None:
    """As Ctrl-C does."""
    os.kill(process.pid, signal.SIGINT)
