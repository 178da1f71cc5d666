"""Hosts that run short of memory or disk: memory cgroups, swap files, full file systems."""

import ctypes
import errno
import os
import shutil
import subprocess
import threading
import uuid
from pathlib import Path

from sterna.launch.errors import Unsupported
from sterna.testbed.errors import BedError
from sterna.testbed.journal import EntryKind, Journal

_PREFIX = "sterna-testbed-"
_DISK_BYTES = 1 << 20
_TRIES = 20
_SQUEEZE_SECONDS = 0.02
_libc = ctypes.CDLL(None, use_errno=True)


class MemoryGroup:
    """A memory cgroup, of version 2 where it has the memory controller, else of version 1.

    :raise Unsupported: When this process may not make one.
    """

    def __init__(self, journal: Journal) -> None:
        self._squeezed = threading.Event()
        self._squeezer: threading.Thread | None = None
        parent, self._unified = _memory_controller()
        self._path = parent / f"{_PREFIX}{uuid.uuid4().hex[:12]}"
        self._journal = journal
        journal.add(EntryKind.CGROUP, self._path)
        try:
            self._path.mkdir()
            if not (self._path / self._limit_file).exists():
                raise Unsupported(f"{parent} does not hand on the memory controller to groups below it")
        except PermissionError as error:
            raise Unsupported("memory groups need root") from error
        except OSError as error:
            raise Unsupported(f"no memory group can be made in {parent}: {error.strerror}") from error

    def add(self, pid: int) -> None:
        """Count a process's memory from now on; what it has already is counted where it was."""
        self._write("cgroup.procs", str(pid))

    def usage(self) -> int:
        """Bytes in use."""
        name = "memory.current" if self._unified else "memory.usage_in_bytes"
        return int((self._path / name).read_text())

    def limit(self, size: int) -> None:
        """Allow no more; what is above is reclaimed, or processes are killed.

        :raise BedError: When the kernel can reclaim no more and would not kill for a lower limit (version 1).
        """
        if not self._try_limit(size):
            raise BedError(f"cannot reclaim memory down to {size} bytes")

    def squeeze(self, size: int) -> None:
        """Leave its processes so much, but where the kernel finds nothing to reclaim, they keep what they have: none is killed,
        and none is refused memory.
        """
        if self._unified:
            self._write("memory.high", str(size))
            return
        # Version 1 has nothing like it: a limit that stays refuses memory to system calls, whoever kills nobody for it ("OOM
        # control"). So what is above is reclaimed again and again, each time by a limit of a moment.
        self._write("memory.oom_control", "1")
        self._reclaim(size)
        squeezer = threading.Thread(target=self._squeeze, args=(size,), name="squeezer", daemon=True)
        squeezer.start()
        self._squeezer = squeezer

    def close(self) -> None:
        """Remove it; processes that are left go back to the group above."""
        self._squeezed.set()
        if self._squeezer is not None:
            self._squeezer.join()
        self._journal.undo(EntryKind.CGROUP, self._path)

    def _squeeze(self, size: int) -> None:
        """On a thread of its own: what waits for memory may keep the bed's own thread waiting."""
        try:
            while not self._squeezed.wait(_SQUEEZE_SECONDS):
                if self.usage() > size:
                    self._reclaim(size)
        except OSError:
            return  # it went with the bed

    def _reclaim(self, size: int) -> None:
        try:
            self._try_limit(size)
        finally:
            self._write(self._limit_file, "-1")

    def _try_limit(self, size: int) -> bool:
        """:return: whether the kernel could reclaim enough, or would kill for it (version 2)
        :raise BedError: When it takes no limit.
        """
        for attempt in range(_TRIES):
            try:
                self._write(self._limit_file, str(size + attempt * (size >> 6)))
                return True
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise BedError(f"cannot limit memory to {size} bytes: {error.strerror}") from error
        return False

    @property
    def _limit_file(self) -> str:
        return "memory.max" if self._unified else "memory.limit_in_bytes"

    def _write(self, name: str, text: str) -> None:
        with open(self._path / name, "w", encoding="ascii") as file:
            file.write(text)


def use_swap_file(journal: Journal, directory: Path, size: int) -> None:
    """Make a swap file, which is in use until it is undone.

    :raise Unsupported: When this process may not, a tool is missing, or the file system cannot hold one.
    """
    if os.geteuid() != 0:
        raise Unsupported("swap files need root")
    if shutil.which("mkswap") is None:
        raise Unsupported("mkswap is missing: apt install util-linux")
    path = directory / "swap"
    journal.add(EntryKind.SWAP, path)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, size)
        finally:
            os.close(fd)
    except OSError as error:
        raise Unsupported(f"no room for a swap file of {size >> 20} MiB: {error.strerror}") from error
    done = subprocess.run(["mkswap", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise Unsupported(f"mkswap: {done.stderr.strip()}")
    if _libc.swapon(os.fsencode(path), 0) != 0:
        raise Unsupported(f"swapon: {os.strerror(ctypes.get_errno())}")


class FullDisk:
    """A small file system of its own.

    :ivar path: where it is
    :raise Unsupported: When this process may not mount one.
    """

    def __init__(self, journal: Journal, directory: Path) -> None:
        self.path = directory / f"disk-{uuid.uuid4().hex[:8]}"
        self._journal = journal
        journal.add(EntryKind.MOUNT, self.path)
        self.path.mkdir()
        options = f"size={_DISK_BYTES}".encode()
        if _libc.mount(b"sterna-testbed", os.fsencode(self.path), b"tmpfs", 0, options) != 0:
            number = ctypes.get_errno()
            if number == errno.EPERM:
                raise Unsupported("mounting needs root")
            raise Unsupported(f"no file system can be mounted: {os.strerror(number)}")

    def fill(self) -> None:
        """Leave no byte free."""
        with open(self.path / "ballast", "wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise BedError(f"cannot fill {self.path}: {error.strerror}") from error

    def close(self) -> None:
        self._journal.undo(EntryKind.MOUNT, self.path)


def swapped_bytes(pid: int) -> int:
    """How much of a process is in swap."""
    with open(f"/proc/{pid}/status", "rb") as file:
        for line in file:
            if line.startswith(b"VmSwap:"):
                return int(line.split()[1]) << 10
    return 0


def _memory_controller() -> tuple[Path, bool]:
    """The group in which this process may make others, and whether it is of version 2."""
    # What is mounted elsewhere may have any bytes for a name.
    mounts = [line.split() for line in os.fsdecode(Path("/proc/mounts").read_bytes()).split("\n") if line]
    lines = os.fsdecode(Path("/proc/self/cgroup").read_bytes()).split("\n")
    groups = dict(line.split(":", 2)[1:] for line in lines if line)
    for _, where, kind, options, *_ in mounts:
        if kind == "cgroup2" and "memory" in (Path(where) / "cgroup.controllers").read_text().split():
            return Path(where), True
        if kind == "cgroup" and "memory" in options.split(","):
            own = next((path for names, path in groups.items() if "memory" in names.split(",")), "/")
            inside = Path(where) / own.lstrip("/")
            return (inside if inside.is_dir() else Path(where)), False
    raise Unsupported("this machine has no memory cgroups")
