"""A `sterna run` in a process of its own, which ends with ours."""

import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from sterna.cli.errors import CliError
from sterna.monitor.client import ConnectionLost, QmpClient
from sterna.monitor.protocol import QmpError

_START_SECONDS = 120.0
"""Kernels may have to be compiled first."""
_QUIT_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1


class VmProcess:
    """Starts when made; `ready` waits for its monitor. A context manager: the process is gone at its end.

    :ivar qmp: the connection to its monitor, once `ready`

    :param name: for people
    :param arguments: of `sterna run`, without its monitor and serial line
    :raise CliError: When no process can be made.
    """

    def __init__(self, name: str, arguments: Sequence[str]) -> None:
        self.name = name
        self.qmp: QmpClient
        self._directory = tempfile.TemporaryDirectory(prefix="sterna-")
        self._path = os.path.join(self._directory.name, "qmp")
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        # We listen and the child accepts: a connection made now waits, nothing races.
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._path)
            listener.listen()
            fd = listener.fileno()
            command = [sys.executable, "-m", "sterna", "run", *arguments]
            try:
                self._process = subprocess.Popen(
                    [*command, "--name", name, "--serial", "null", "--qmp", f"fd:{fd}"],
                    pass_fds=[fd],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=self._errors,
                    # Ctrl-C at the terminal is ours to handle.
                    process_group=0,
                    preexec_fn=_die_with_parent,
                )
            except OSError as error:
                self._errors.close()
                self._directory.cleanup()
                raise CliError(f"cannot start a process: {error.strerror}") from error

    def ready(self, check: Callable[[], None]) -> None:
        """Wait for the monitor.

        :param check: called now and then; may raise
        :raise CliError: When the process has ended, or does not answer in time; with what it said last.
        """
        deadline = time.monotonic() + _START_SECONDS
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(self._path)
        connection.settimeout(0.1)
        # The greeting tells that it is up; an early end shows within the timeout.
        while True:
            try:
                connection.recv(1, socket.MSG_PEEK)
                break
            except TimeoutError:
                check()
                if self._process.poll() is not None or time.monotonic() > deadline:
                    connection.close()
                    raise CliError(f"the {self.name} did not start: {self._last_words()}") from None
            except OSError as error:
                connection.close()
                raise CliError(f"the {self.name} did not start: {self._last_words()}") from error
        try:
            self.qmp = QmpClient(connection, f"the {self.name}")
        except ConnectionLost as error:
            raise CliError(f"the {self.name} did not start: {self._last_words()}") from error

    def command(self, name: str, **arguments: Any) -> Any:
        """A QMP command.

        :raise CliError: When it fails, or the process has ended.
        """
        try:
            return self.qmp.command(name, **arguments)
        except QmpError as error:
            raise CliError(f"{name} at the {self.name}: {error.desc}") from error
        except ConnectionLost as error:
            raise CliError(f"the {self.name} was lost: {self._last_words() or error}") from error

    def memory(self, address: int, size: int) -> "memoryview[int]":
        """Guest memory, as of now."""
        fd = os.memfd_create("sterna-memory", os.MFD_CLOEXEC)
        try:
            self.command("pmemsave", val=address, size=size, filename=f"/proc/{os.getpid()}/fd/{fd}")
            data = bytearray(size)
            view, got = memoryview(data), 0
            while got < size:
                more = os.preadv(fd, [view[got : got + (1 << 30)]], got)
                if not more:
                    raise CliError(f"the {self.name} saved {got} of {size} bytes of guest memory")
                got += more
        finally:
            os.close(fd)
        return view

    def close(self) -> None:
        """End the process, politely first. Does nothing the second time."""
        if self._errors.closed:
            return
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_QUIT_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
        self._process.wait()
        if hasattr(self, "qmp"):
            self.qmp.close()
        self._errors.close()
        self._directory.cleanup()

    def __enter__(self) -> "VmProcess":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _last_words(self) -> str:
        """The last line of its standard error, or how it ended."""
        try:
            self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "no answer from its monitor"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        return said.removeprefix("sterna: error: ") or f"exit code {self._process.returncode}"


_libc = ctypes.CDLL(None, use_errno=True)
_parent = os.getpid()


def _die_with_parent() -> None:
    """In the child: SIGKILL comes when the parent ends, however it does."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != _parent:
        os._exit(1)
