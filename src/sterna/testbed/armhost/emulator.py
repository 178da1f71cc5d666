"""QEMU as the machine that the host is: boots it, runs one command there, and ends with it."""

import contextlib
import io
import os
import selectors
import shlex
import shutil
import socket
import subprocess
import tarfile
import tempfile
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from sterna.host.closing import Closing
from sterna.launch.process import die_with_parent
from sterna.testbed.armhost.recipe import PYTHON_VERSION, is_package
from sterna.testbed.errors import ImageError

PROGRAM = "qemu-system-aarch64"
CPUS = {"cortex-a57": "cortex-a57", "max": "max,pauth-impdef=on,sve=off"}
"""Cortex-A57: KVM runs apart from the kernel (nVHE), and guests may be 32-bit. Max: KVM inside the kernel (VHE).

Max goes without SVE: of what an SVE store replaces, QEMU 7.2 forgets the translated code only where the first byte is. With
SVE, glibc copies that way, and guests then run what their memory held before.
"""
# Bytecode that this Python has left beside the sources saves the host's Python, if it is of the same version, a lot of time.
_BYTECODE = f".cpython-{PYTHON_VERSION.replace('.', '')}"
LEAST_MEMORY_MIB = 512
"""RAM with which it boots, and has some to spare: its file system is there twice until the kernel has unpacked it."""
_KERNEL_LOG_LINES = 30
_READ_BYTES = 1 << 16
_NOT_IN_TREE = frozenset(
    {
        *(".git", ".venv", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".import_linter_cache"),
        *(".mutants", ".versions"),
    }
)


@dataclass(frozen=True)
class HostSettings:
    """The emulated hardware.

    :ivar cpu: a key of `CPUS`
    :ivar memory_mib: its RAM
    :ivar gic: version of the interrupt controller, 2 or 3; KVM offers its guests the same
    :ivar forwards: TCP ports of this machine's loopback interface, each with the port of the host's that is reached there
    """

    cpu: str = "cortex-a57"
    smp: int = 2
    memory_mib: int = 2048
    gic: int = 3
    forwards: tuple[tuple[int, int], ...] = ()


def require_qemu() -> str:
    """The emulator's path.

    :raise ImageError: When it is not installed.
    """
    path = shutil.which(PROGRAM)
    if path is None:
        raise ImageError(f"{PROGRAM} is missing: apt install qemu-system-arm")
    return path


def run(
    kernel: Path,
    initramfs: Path,
    command: Sequence[str],
    *,
    settings: HostSettings,
    tree: Path | None,
    out: BinaryIO | None,
    err: BinaryIO | None,
    timeout_s: float | None = None,
    check: Callable[[], None] = lambda: None,
) -> int:
    """Boot the host, run `command` in a copy of `tree`, and return its exit code.

    :param out: gets what the command writes to its standard output, as it comes; None: `command` has this process's terminal,
        and reads from it as well, for as long as it likes
    :param err: the same for its standard error
    :param timeout_s: how long all of that may take
    :param check: called now and then; what it raises ends the host
    :raise ImageError: When QEMU is missing, the host breaks, or time is up.
    """
    sinks = {name: sink for name, sink in (("out", out), ("err", err)) if sink is not None}
    with _Host(kernel, initramfs, command, settings, tree, sinks) as host:
        host.copy_output(timeout_s, check)
        return host.exit_code()


class _Host(Closing):
    """One boot of the emulated host.

    :param sinks: what takes each output of the command; none: it has this process's terminal
    """

    def __init__(
        self,
        kernel: Path,
        initramfs: Path,
        command: Sequence[str],
        settings: HostSettings,
        tree: Path | None,
        sinks: Mapping[str, BinaryIO],
    ) -> None:
        qemu = require_qemu()
        self._sinks = sinks
        with contextlib.ExitStack() as stack:
            self._directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sterna-armhost-")))
            _write_job(self._directory / "job.tar", command, tree)
            (self._directory / "status").touch()
            self._streams: dict[str, socket.socket] = {}
            passed: dict[str, socket.socket] = {}
            for name in sinks:
                ours, theirs = socket.socketpair()
                self._streams[name] = stack.enter_context(ours)
                passed[name] = stack.enter_context(theirs)
            if not sinks:
                # QEMU takes it over, and cannot give it back when it is killed.
                stack.callback(termios.tcsetattr, 0, termios.TCSANOW, termios.tcgetattr(0))
            self._errors = stack.enter_context(tempfile.TemporaryFile())
            standard = subprocess.DEVNULL if sinks else None
            try:
                self._process = subprocess.Popen(
                    [
                        *(qemu, *_machine(settings), "-kernel", str(kernel), "-initrd", str(initramfs)),
                        *_files(self._directory),
                        *(_ports(passed) if sinks else _terminal()),
                    ],
                    pass_fds=[theirs.fileno() for theirs in passed.values()],
                    stdin=standard,
                    stdout=standard,
                    stderr=self._errors,
                    preexec_fn=die_with_parent,
                )
            except OSError as error:
                raise ImageError(f"cannot start {qemu}: {error.strerror}") from error
            stack.callback(self._process.wait)
            stack.callback(self._process.kill)
            for theirs in passed.values():
                theirs.close()
            self._resources = stack.pop_all()

    def close(self) -> None:
        self._resources.close()

    def copy_output(self, timeout_s: float | None, check: Callable[[], None]) -> None:
        """Hand on what the command writes until the host has switched itself off."""
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        with selectors.DefaultSelector() as selector:
            for name, stream in self._streams.items():
                selector.register(stream, selectors.EVENT_READ, self._sinks[name])
            while selector.get_map():
                check()
                if deadline is not None and time.monotonic() > deadline:
                    raise ImageError(f"the host was not done after {timeout_s:g} s\n{self._kernel_log()}")
                for key, _events in selector.select(0.2):
                    assert isinstance(key.fileobj, socket.socket)
                    data = key.fileobj.recv(_READ_BYTES)
                    if data:
                        key.data.write(data)
                        key.data.flush()
                    else:
                        selector.unregister(key.fileobj)
        self._process.wait()

    def exit_code(self) -> int:
        """The command's exit code.

        :raise ImageError: When the host ended without telling it.
        """
        said = (self._directory / "status").read_text().strip()
        if said.isdecimal():
            return int(said)
        self._errors.seek(0)
        complaint = self._errors.read().decode(errors="replace").strip()
        raise ImageError(complaint or f"the host ended before the command did\n{self._kernel_log()}")

    def _kernel_log(self) -> str:
        try:
            lines = (self._directory / "kernel.log").read_text(errors="replace").splitlines()
        except OSError:
            return "it printed nothing"
        return "\n".join(["the kernel printed last:", *lines[-_KERNEL_LOG_LINES:]])


def _machine(settings: HostSettings) -> list[str]:
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in settings.forwards)
    return [
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-M", f"virt,virtualization=on,gic-version={settings.gic}", "-cpu", CPUS[settings.cpu]),
        *("-smp", str(settings.smp), "-m", str(settings.memory_mib), "-accel", "tcg,thread=multi"),
        *("-append", "console=ttyAMA0 quiet panic=-1"),
        *("-netdev", f"user,id=net{forwards}", "-device", "virtio-net-device,netdev=net"),
        *("-device", "virtio-serial-device"),
    ]


def _files(folder: Path) -> list[str]:
    directory = str(folder).replace(",", ",,")  # how QEMU wants a comma in a value
    return [
        *("-serial", f"file:{directory}/kernel.log"),
        *("-drive", f"file={directory}/job.tar,if=none,id=job,format=raw,readonly=on"),
        *("-device", "virtio-blk-device,drive=job"),
        *("-chardev", f"file,id=status,path={directory}/status"),
        *("-device", "virtserialport,chardev=status,name=status"),
    ]


def _ports(sockets: Mapping[str, socket.socket]) -> list[str]:
    return [
        argument
        for name, theirs in sockets.items()
        for argument in (
            *("-chardev", f"socket,id={name},fd={theirs.fileno()}"),
            *("-device", f"virtserialport,chardev={name},name={name}"),
        )
    ]


def _terminal() -> list[str]:
    return [
        *("-chardev", "stdio,id=terminal,signal=off"),
        *("-device", "virtconsole,chardev=terminal,name=terminal"),
    ]


def _write_job(path: Path, command: Sequence[str], tree: Path | None) -> None:
    """What the host does, as an archive on its disk: `command`, and the folder `tree`; of a package, one that has it in `src`."""
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as archive:
        script = shlex.join(command).encode() + b"\n"
        member = tarfile.TarInfo("command")
        member.size = len(script)
        archive.addfile(member, io.BytesIO(script))
        folder = tarfile.TarInfo("tree")
        folder.type, folder.mode = tarfile.DIRTYPE, 0o755
        archive.addfile(folder)
        if tree is not None and is_package(tree):
            _add(archive, tree, f"tree/src/{tree.name}")
        elif tree is not None:
            for name in sorted(os.listdir(tree)):
                _add(archive, tree / name, f"tree/{name}")


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    """Add a file, or a folder with all that the host can use. What goes meanwhile, as Pythons exchange byte code, is left out."""
    if not _is_of_use(path.name):
        return
    with contextlib.suppress(FileNotFoundError):
        member = archive.gettarinfo(path, name)
        if member is None:  # a socket
            return
        member.uid = member.gid = 0
        if member.isreg():
            with path.open("rb") as file:
                archive.addfile(member, file)
            return
        archive.addfile(member)
        for inner in sorted(os.listdir(path)) if member.isdir() else ():
            _add(archive, path / inner, f"{name}/{inner}")


def _is_of_use(name: str) -> bool:
    if name in _NOT_IN_TREE or name.endswith(".egg-info"):
        return False
    # One that is just being written has something behind its name.
    return ".pyc" not in name or (name.endswith(".pyc") and _BYTECODE in name)
