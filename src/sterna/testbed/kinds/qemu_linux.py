"""QEMU with a real ARM Linux guest, its root file system on NFS."""

import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sterna.boards.virt import BOARD as VIRT
from sterna.guests.catalog import LINUX_PROGRAMS
from sterna.launch.command import qemu_arguments
from sterna.launch.errors import Unsupported
from sterna.launch.host import Host
from sterna.launch.process import VmProcess
from sterna.machine.config import MachineConfig
from sterna.testbed.debian.cache import INITRAMFS, KERNEL
from sterna.testbed.errors import BedError, ScenarioError
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.kinds.qemu import QemuKind
from sterna.testbed.linuxguest.guest import GuestIdentity, LinuxGuest, LinuxProcess
from sterna.testbed.linuxguest.image import LinuxImage, obtain
from sterna.testbed.linuxguest.keys import HOST
from sterna.testbed.network import GuestNic, Network
from sterna.testbed.nfs import NfsServer, check_tools
from sterna.testbed.session import SshSession
from sterna.testbed.settings import VmSettings

_LEAST_MEMORY = 128 << 20
_PROBE_SECONDS = 30
_ARGUMENTS = {"dirtyram": 3, "clock": 1, "random": 4}
"""The most that each program takes."""


@dataclass
class _Store:
    """The shared directory of one bed.

    :ivar server: None: all hosts read it directly
    :ivar identities: by the guest's name, of the latest guest of that name
    """

    directory: Path
    server: NfsServer | None
    identities: dict[str, GuestIdentity] = field(default_factory=dict)
    disks: int = 0

    def new_disk(self, image: LinuxImage) -> str:
        self.disks += 1
        name = f"root-{self.disks}.ext4"
        copy_sparse(image.root, self.directory / name)
        return name

    def blockdev(self, name: str) -> str:
        """For QEMU's -blockdev."""
        file = {"driver": "file", "filename": str(self.directory / name), "locking": "off"}
        if self.server is not None:
            file = self.server.url(name)
        options = {"driver": "raw", "node-name": "root", "cache.direct": "on"}
        options |= {f"file.{key}": value.replace(",", ",,") for key, value in file.items()}
        return ",".join(f"{key}={value}" for key, value in options.items())


class QemuLinuxKind(QemuKind):
    """`qemu-system-arm` with ARM Linux, which runs a guest program as a process.

    :ivar image: what guests are made of, once `check` found all well
    """

    name = "qemu-linux"
    connected = True
    warm_up_seconds = 600.0

    image: LinuxImage
    _store: _Store

    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        super().check(say)
        if os.geteuid() == 0:
            check_tools()
            _check_client(self._binary())
        self.image = obtain(say)

    @contextlib.contextmanager
    def set_up(self, network: Network, directory: Path) -> Iterator[None]:
        shared = directory / "shared"
        shared.mkdir()
        for name in (KERNEL, INITRAMFS):
            shutil.copy(self.image.folder / name, shared / name)
        with contextlib.ExitStack() as stack:
            server = None
            if network.server.namespace is not None:
                server = stack.enter_context(NfsServer(network.server, shared, directory))
            self._store = _Store(shared, server)
            yield

    def check_session(self) -> None:
        if shutil.which("ssh") is None:
            raise Unsupported("ssh is missing: apt install openssh-client")

    def session(self, client: Host, address: str, directory: Path) -> SshSession:
        keys = self.image.keys
        return SshSession(client, address, keys.client, keys.public(HOST), directory)

    def guest(self, settings: VmSettings) -> ObservedGuest:
        return LinuxGuest(int(VIRT.ram_base), self._memory_bytes(settings))

    def _kernel(self, settings: VmSettings, nic: GuestNic | None) -> Mapping[str, str]:
        _validate(settings)
        return {"kernel": str(self._store.directory / KERNEL), "append": _command_line(settings, nic)}

    def _start_vm(
        self, name: str, host: Host, settings: VmSettings, config: MachineConfig, **line: Any
    ) -> VmProcess:
        store, guest = self._store, name.rpartition(" on ")[0]  # its host's name is behind that
        boots = "incoming" not in line
        disk = store.new_disk(self.image) if boots else store.identities[guest].disk
        # What the user wants besides, and what is not a board's own.
        extra = [*self.options.arguments, "-no-reboot", "-blockdev", store.blockdev(disk)]
        extra += ["-device", "virtio-blk-device,drive=root", "-device", "virtio-rng-device"]
        if boots:
            extra += ["-initrd", str(store.directory / INITRAMFS)]
        vm = LinuxProcess(name, self._binary(), qemu_arguments(config, extra=extra, **line), host)
        if boots:
            store.identities[guest] = GuestIdentity(disk, vm.console)
        vm.identity = store.identities[guest]
        return vm


def copy_sparse(source: Path, target: Path) -> None:
    """Copy a file; what was never written there takes no room here either.

    :raise BedError: When it has no room.
    """
    try:
        with source.open("rb") as old, target.open("xb") as new:
            size = os.fstat(old.fileno()).st_size
            os.ftruncate(new.fileno(), size)
            at = 0
            while at < size:
                try:
                    at = os.lseek(old.fileno(), at, os.SEEK_DATA)
                except OSError:
                    break  # ENXIO: no more data
                end = os.lseek(old.fileno(), at, os.SEEK_HOLE)
                while at < end:
                    data = os.pread(old.fileno(), min(1 << 20, end - at), at)
                    at += os.pwrite(new.fileno(), data, at)
    except OSError as error:
        raise BedError(f"cannot copy the root file system to {target}: {error.strerror}") from error


def _command_line(settings: VmSettings, nic: GuestNic | None) -> str:
    words = ["console=ttyAMA0", "quiet", "panic=-1", "cma=0", f"sterna.program={settings.program}"]
    if arguments := ",".join(settings.arguments.split()):
        words.append(f"sterna.arguments={arguments}")
    if settings.swap_bytes:
        words.append(f"sterna.swap={settings.swap_bytes}")
    if nic is not None:
        words += [f"sterna.address={nic.address}/{nic.prefix}", f"sterna.gateway={nic.gateway}"]
    return " ".join(words)


def _validate(settings: VmSettings) -> None:
    if settings.program not in LINUX_PROGRAMS:
        raise Unsupported(f"the Linux guest has no program {settings.program!r}")
    numbers = settings.arguments.split()
    if len(numbers) > _ARGUMENTS[settings.program] or not all(number.isdecimal() for number in numbers):
        raise ScenarioError(f"[vm] {settings.program}: {settings.arguments!r} is not what it takes")
    if settings.memory_bytes < _LEAST_MEMORY:
        raise ScenarioError(f"[vm] memory: Linux needs {_LEAST_MEMORY >> 20} MiB")


def _check_client(binary: str) -> None:
    """
    :raise Unsupported: When this QEMU has no NFS client.
    """
    probe = ["-blockdev", "driver=nfs,node-name=probe,server.type=inet,server.host=127.0.0.1,path=/none/none"]
    try:
        done = subprocess.run(
            [binary, "-M", "none", "-nodefaults", "-display", "none", *probe],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_PROBE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unsupported(f"cannot run {binary}: {error}") from error
    if "Unknown driver" in done.stderr or "does not accept value" in done.stderr:
        raise Unsupported(f"{binary} has no NFS client: apt install qemu-block-extra")


KIND = QemuLinuxKind
