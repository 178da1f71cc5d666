"""A VM in a process of its own on one of the hosts, driven by QMP. The process ends with ours."""

import ctypes
import logging
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from io import BufferedReader
from typing import Any

from sterna.host import logs
from sterna.host.closing import Closing
from sterna.host.printable import printable
from sterna.host.pythonprogram import module_command, own_environment
from sterna.launch.console import Console
from sterna.launch.errors import LaunchError, VmError
from sterna.launch.host import LOCAL, Host
from sterna.memory.digest import BlockDigest, digest_file
from sterna.monitor.client import ConnectionLost, QmpClient
from sterna.monitor.protocol import QmpError

log = logging.getLogger(__name__)

_START_SECONDS = 300.0
"""Kernels may have to be compiled first."""
_QUIT_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_SAVE_BYTES = 256 << 20


class VmProcess(Closing):
    """Starts when made; `ready` waits for its monitor. A context manager: the process is gone at its end.

    To be made by a thread that outlives it: the kernel ends the process with the thread that made it.

    :ivar qmp: the connection to its monitor, once `ready`
    :ivar shared_ram: its RAM, where that is a file of the test bed's
    :ivar console: its first serial line

    :param name: for people
    :param host: where it runs
    :raise VmError: When no process can be made.
    """

    shared_ram: "SharedRam | None" = None

    def __init__(self, name: str, host: Host = LOCAL) -> None:
        self.name = name
        self.host = host
        self.qmp: QmpClient
        with ExitStack() as opened:
            try:
                self.console = Console()
                opened.callback(self.console.close)
                self._errors = opened.enter_context(tempfile.TemporaryFile())
                self._connection = opened.enter_context(socket.socket(socket.AF_UNIX))
                # We listen and connect, and the child accepts: nothing races, and the path is needed no longer.
                with (
                    tempfile.TemporaryDirectory(prefix="sterna-") as directory,
                    socket.socket(socket.AF_UNIX) as own,
                ):
                    path = os.path.join(directory, "qmp")
                    own.bind(path)
                    own.listen()
                    self._connection.connect(path)
                    self._process = self._start(own.fileno(), self.console.fd, self._errors.fileno())
            except (OSError, subprocess.SubprocessError, RuntimeError) as error:
                raise VmError(f"cannot start the {name}: {getattr(error, 'strerror', error)}") from error
            opened.pop_all()  # `close` closes them
        log.info("the %s is process %d", name, self._process.pid)
        self.console.give_away()

    @abstractmethod
    def _command(self, qmp: int, serial: int) -> Sequence[str]:
        """The program and its arguments.

        :param qmp: descriptor of the socket where it accepts its monitor's connection
        :param serial: descriptor of the pipe that its first serial line goes to
        """

    def _environment(self) -> Mapping[str, str]:
        return os.environ

    def _start(self, qmp: int, serial: int, errors: int) -> "subprocess.Popen[bytes]":
        """The process.

        :param errors: descriptor of what its standard error goes to
        """
        command = self._command(qmp, serial)
        log.debug("the %s: %s", self.name, shlex.join(command))
        return subprocess.Popen(
            command,
            pass_fds=[qmp, serial],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=self._environment(),
            # Ctrl-C at the terminal is ours to handle.
            process_group=0,
            preexec_fn=partial(move_in, self.host),
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ready(self, check: Callable[[], None] = lambda: None) -> None:
        """Wait for the monitor. Does nothing the second time.

        :param check: called now and then; may raise
        :raise VmError: When the process has ended, or does not answer in time; with what it said last.
        """
        if hasattr(self, "qmp"):
            return
        deadline = time.monotonic() + _START_SECONDS
        self._connection.settimeout(0.1)
        # The greeting tells that it is up; an early end shows within the timeout.
        while True:
            try:
                self._connection.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                check()
                if not self.alive or time.monotonic() > deadline:
                    raise VmError(f"the {self.name} did not start: {self.last_words()}") from None
            except OSError as error:
                raise VmError(f"the {self.name} did not start: {self.last_words()}") from error
        try:
            self.qmp = QmpClient(self._connection, f"the {self.name}", _START_SECONDS)
        except ConnectionLost as error:
            raise VmError(f"the {self.name} did not start: {self.last_words()}") from error

    def command(self, name: str, **arguments: Any) -> Any:
        """A QMP command.

        :raise VmError: When it fails, or the process has ended.
        """
        try:
            return self.qmp.command(name, **arguments)
        except QmpError as error:
            raise VmError(f"{name} at the {self.name}: {error.desc}") from error
        except ConnectionLost as error:
            raise VmError(f"the {self.name} was lost: {self.last_words() or error}") from error

    def runs(self) -> bool:
        """Whether the guest runs here."""
        return bool(self.command("query-status")["running"])

    def incoming_uri(self) -> str:
        """Where it waits for a guest."""
        [address] = self.command("query-migrate")["socket-address"]
        return f"tcp:{address['host']}:{address['port']}"

    def memory(self, address: int, size: int) -> "memoryview[int]":
        """Guest memory, as of now."""
        data = memoryview(bytearray(size))
        with self._saved("pmemsave", val=address, size=size) as file:
            got = file.readinto(data)
        if got != size:
            raise VmError(f"the {self.name} saved {got} of {size} bytes of guest memory")
        return data

    def virtual_memory(self, address: int, size: int, cpu: int) -> bytes:
        """What a vCPU sees at a virtual address, as of now. QEMU's alone.

        :raise VmError: When it sees nothing there.
        """
        with self._saved("memsave", val=address, size=size, cpu_index=cpu) as file:
            return file.read()

    def digest(self, address: int, size: int) -> BlockDigest:
        """Digests of guest memory per 2 MiB. The guest must be stopped."""
        parts = []
        for at in range(address, address + size, _SAVE_BYTES):
            with self._saved("pmemsave", val=at, size=min(_SAVE_BYTES, address + size - at)) as file:
                parts.append(digest_file("ram", file))
        return BlockDigest.join(parts)

    @contextmanager
    def _saved(self, command: str, **arguments: int) -> Iterator[BufferedReader]:
        """A file with no name that holds what a command saves of the guest's memory."""
        fd = os.memfd_create("sterna-memory", os.MFD_CLOEXEC)
        with open(fd, "rb") as file:
            self.command(command, **arguments, filename=f"/proc/{os.getpid()}/fd/{fd}")
            yield file

    def guest_cpu_seconds(self) -> float:
        """CPU time that its vCPU threads have had (/proc/PID/task/TID/schedstat, in ns)."""
        threads = [cpu["thread-id"] for cpu in self.command("query-cpus-fast")]
        total = 0
        for thread in threads:
            try:
                with open(f"/proc/{self.pid}/task/{thread}/schedstat", encoding="ascii") as file:
                    total += int(file.read().split()[0])
            except (OSError, IndexError) as error:
                raise LaunchError(
                    f"the kernel does not tell the CPU time of thread {thread}: {error}"
                ) from error
        return total / 1e9

    def kill(self) -> None:
        """As when its host loses power. Returns when it is gone."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End the process, politely first. Does nothing the second time."""
        if self._errors.closed:
            return
        if self.alive:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_QUIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        log.info("the %s has ended with exit code %d", self.name, self._process.wait())
        self._connection.close()
        self.console.close()
        self._errors.close()
        if self.shared_ram is not None:
            self.shared_ram.close()

    def last_words(self) -> str:
        """The last line of its standard error, or how it ended."""
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "no answer from its monitor"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        return printable(said.removeprefix("sterna: error: ")) or f"exit code {self._process.returncode}"


class SharedRam:
    """A VM's RAM as a file with no name.

    :param block: the RAM block that it is, by its name in the stream
    """

    def __init__(self, block: str, size: int) -> None:
        self.block = block
        self.fd = os.memfd_create("sterna-ram", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size)

    @property
    def path(self) -> str:
        """Where other processes of the same user find it."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    def close(self) -> None:
        """Let go of it. Does nothing the second time."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class SternaProcess(VmProcess):
    """A `sterna run`.

    :param arguments: without its monitor and serial line
    :param module: that has the command line
    """

    def __init__(
        self, name: str, arguments: Sequence[str], host: Host = LOCAL, module: str = "sterna"
    ) -> None:
        self._arguments = arguments
        self._module = module
        super().__init__(name, host)

    def _command(self, qmp: int, serial: int) -> Sequence[str]:
        return module_command(self._module, *logs.arguments(), *self.command_line(qmp, serial))

    def command_line(self, qmp: int, serial: int) -> Sequence[str]:
        """What follows the program's name."""
        line = ["run", *self._arguments, "--name", self.name]
        if "--serial" not in self._arguments:
            line += ["--serial", f"file:/dev/fd/{serial}"]
        return [*line, "--qmp", f"fd:{qmp}"]

    def _environment(self) -> Mapping[str, str]:
        return own_environment()


class QemuProcess(VmProcess):
    """A QEMU.

    :param binary: its program
    :param arguments: without its monitor and serial line
    :param ram: the file that is its RAM, which goes with it; None when it has memory of its own
    """

    def __init__(
        self,
        name: str,
        binary: str,
        arguments: Sequence[str],
        host: Host = LOCAL,
        ram: SharedRam | None = None,
    ) -> None:
        self._binary = binary
        self.shared_ram = ram
        self._arguments = arguments
        super().__init__(name, host)

    def _command(self, qmp: int, serial: int) -> Sequence[str]:
        command = [self._binary, *self._arguments, "-name", self.name, "-nodefaults", "-display", "none"]
        command += [
            "-chardev",
            f"socket,id=qmp,fd={qmp},server=on,wait=off",
            "-mon",
            "chardev=qmp,mode=control",
        ]
        if "-serial" not in self._arguments:
            command += ["-chardev", f"file,id=serial,path=/dev/fd/{serial}", "-serial", "chardev:serial"]
        return command


_libc = ctypes.CDLL(None, use_errno=True)
_parent = os.getpid()


def die_with_parent() -> None:
    """In the child: SIGKILL comes when the parent ends, however it does."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _parent:
        os._exit(1)


def move_in(host: Host) -> None:
    """In a child between fork and exec: it ends with its parent, and runs on the host."""
    die_with_parent()
    host.enter()
