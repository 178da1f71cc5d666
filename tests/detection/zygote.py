"""VMs without a start-up: a process that has the program in memory, its kernels compiled, and forks one for each VM.

What runs is `sterna run` in a process of its own, with its own arguments; only the seconds that an interpreter needs to load
numba and Unicorn are spent once. As a program it is that process: its argument is the descriptor of a socket, where each
message is a VM's arguments with the descriptors that it is to have.
"""

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from sterna.launch.host import Host
from sterna.launch.process import SternaProcess
from sterna.testbed.kind import KindOptions
from sterna.testbed.sternakind import SternaKind

_QMP, _SERIAL = 198, 199
"""Descriptors in the VM's process."""
_PR_SET_PDEATHSIG = 1
_CLONE_NEWNET = 0x40000000
_STATUS = struct.Struct("=i")
_MESSAGE_BYTES = 1 << 16


class ForkedProcess:
    """As much of `subprocess.Popen` as a VM needs.

    :param status: where the exit code comes
    """

    def __init__(self, pid: int, status: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._status = status

    def poll(self) -> int | None:
        return self._look(0.0)

    def wait(self, timeout: float | None = None) -> int:
        if self._look(timeout) is None:
            raise subprocess.TimeoutExpired("sterna run", timeout or 0.0)
        assert self.returncode is not None
        return self.returncode

    def _look(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._status], [], [], timeout)[0]:
            data = os.read(self._status, _STATUS.size)
            os.close(self._status)
            # Whoever keeps the VM dies with us or with it, so nothing at all is its death as well.
            self.returncode = _STATUS.unpack(data)[0] if data else -signal.SIGKILL
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Zygote:
    """The process that forks VMs. A context manager."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.detection.zygote", str(its.fileno())], pass_fds=[its.fileno()]
            )
        assert self._socket.recv(1), "the zygote did not come up"

    def start(self, arguments: Sequence[str], descriptors: Sequence[int], host: Host) -> ForkedProcess:
        """A new process that runs the command line.

        :param descriptors: of the monitor's listening socket, of what takes the serial line and of what takes the errors
        """
        reader, writer = os.pipe()
        passed = [*descriptors, writer, *([host.namespace.fd] if host.namespace is not None else [])]
        try:
            with self._lock:
                socket.send_fds(self._socket, [json.dumps(list(arguments)).encode()], passed)
                return ForkedProcess(int(self._socket.recv(64)), reader)
        finally:
            os.close(writer)

    def __enter__(self) -> "Zygote":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._process.wait()


class ForkedVm(SternaProcess):
    """A `sterna run` that a zygote forked."""

    def __init__(self, zygote: Zygote, name: str, arguments: Sequence[str], host: Host) -> None:
        self._zygote = zygote
        super().__init__(name, arguments, host)

    def _start(self, qmp: int, serial: int, errors: int) -> Any:
        return self._zygote.start(self.command_line(_QMP, _SERIAL), [qmp, serial, errors], self.host)


class ForkedKind(SternaKind):
    """The kind of VM of that hypervisor, forked."""

    def __init__(self, zygote: Zygote, accel: str, breakage: str = "") -> None:
        super().__init__(accel, KindOptions(breakage=breakage))
        self._start = lambda name, arguments, host: ForkedVm(zygote, name, arguments, host)


# -- the process itself ---------------------------------------------------------------------------------------


def _die_with_parent(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def _warm_up() -> None:
    """Import and compile all that a VM needs, so that it is there in each fork."""
    for name in ("cli.run", "arch.x86_64.kvm.vm", "monitor.commands", "monitor.server"):
        importlib.import_module(f"sterna.{name}")
    from sterna.cli.kernels import prepare_kernels
    from sterna.machine.config import MachineConfig
    from sterna.machine.machine import Machine
    from sterna.testing.breakages import register_all

    register_all()
    prepare_kernels()
    prepare_kernels("kvm")
    Machine(MachineConfig(memory_bytes=4 << 20, incoming=True)).close()


def _run(arguments: list[str], descriptors: list[int]) -> None:
    """In a VM's process: never returns."""
    code = 1
    try:
        qmp, serial, errors, _, *namespace = descriptors
        if namespace and ctypes.CDLL(None).setns(namespace[0], _CLONE_NEWNET) != 0:
            raise OSError("setns")
        null = os.open(os.devnull, os.O_RDWR)
        for source, target in ((null, 0), (null, 1), (errors, 2), (qmp, _QMP), (serial, _SERIAL)):
            os.dup2(source, target)
        from sterna.cli import main

        main(arguments)
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _keep(arguments: list[str], descriptors: list[int], connection: socket.socket) -> None:
    """In a process for each VM: start it, and tell how it ended. Never returns."""
    _die_with_parent(_ZYGOTE)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    keeper = os.getpid()
    pid = os.fork()
    if pid == 0:
        _die_with_parent(keeper)
        os.setpgid(0, 0)
        connection.close()
        _run(arguments, descriptors)
    connection.send(str(pid).encode())
    status = descriptors[3]
    for descriptor in descriptors:
        if descriptor != status:
            os.close(descriptor)
    connection.close()
    os.write(status, _STATUS.pack(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


def serve(connection: socket.socket) -> None:
    """Fork a VM for each message until nobody sends any more."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers are nobody's concern
    connection.send(b"1")
    while True:
        data, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 8)
        if not data:
            return
        if os.fork() == 0:
            _keep(json.loads(data), descriptors, connection)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    _ZYGOTE = os.getpid()
    _die_with_parent(os.getppid())
    _warm_up()
    serve(socket.socket(fileno=int(sys.argv[1])))
