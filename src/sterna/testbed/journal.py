"""A journal of what a run makes that outlives its process: written before the thing is made, and undone in the end.

Each run has a file that it holds locked; the lock ends with the process, however it ends. A file that nobody holds is that
of a run that was killed: `clean_stale` undoes what it lists. Processes and networks need no entry: processes die with
their parent, and network namespaces with their processes.
"""

import ctypes
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path

import msgspec

from sterna.host.closing import Closing
from sterna.host.filelock import lock, try_lock
from sterna.host.private import UnsafeError, private_directory
from sterna.testbed.errors import BedError

Say = Callable[[str], None]

_libc = ctypes.CDLL(None, use_errno=True)
_DYING_SECONDS = 2.0
_POLL_SECONDS = 0.01


class EntryKind(Enum):
    """What is left behind."""

    DIRECTORY = "directory"
    SWAP = "swap"
    CGROUP = "cgroup"
    MOUNT = "mount"


class _Entry(msgspec.Struct, frozen=True):
    kind: EntryKind
    path: str


def default_directory() -> Path:
    """Where runs keep their files: for root where a reboot empties it."""
    if os.geteuid() == 0:
        return Path("/run/sterna-testbed")
    return Path(tempfile.gettempdir()) / f"sterna-testbed-{os.geteuid()}"


class Journal(Closing):
    """The entries of this run. A context manager: all are undone at its end.

    :param say: told when another run is in the way
    :raise BedError: When the directory cannot be written, or is not this user's own: what is found there is removed.
    """

    def __init__(self, directory: Path | None = None, say: Say = lambda text: None) -> None:
        self._entries: list[_Entry] = []
        directory = directory or default_directory()
        with _locked(directory, say):
            self._path = directory / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            lock(self._fd)

    def add(self, kind: EntryKind, path: Path) -> None:
        """Note what is about to be made."""
        self._entries.append(_Entry(kind, str(path)))
        os.write(self._fd, msgspec.json.encode(self._entries[-1]) + b"\n")

    def undo(self, kind: EntryKind, path: Path) -> None:
        """Undo one entry now.

        :raise OSError: When that fails; it stays noted.
        """
        entry = _Entry(kind, str(path))
        _UNDO[kind](path)
        self._entries.remove(entry)

    def make_directory(self) -> Path:
        """A new directory, for this user only, that goes with the run."""
        path = Path(tempfile.gettempdir()) / f"sterna-testbed-{uuid.uuid4().hex[:12]}"
        self.add(EntryKind.DIRECTORY, path)
        try:
            path.mkdir(mode=0o700)
        except OSError as error:
            raise BedError(f"cannot make {path}: {error.strerror}") from error
        return path

    def close(self) -> None:
        """Undo everything, latest first. Does nothing the second time.

        :raise BedError: When something could not be undone; the next run tries again.
        """
        if self._fd < 0:
            return
        problems = _undo_all(self._entries)
        if not problems:
            self._path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1
        if problems:
            raise BedError("left behind: " + "; ".join(problems))


def clean_stale(directory: Path | None = None, say: Say = lambda text: None) -> list[str]:
    """Undo what runs left that have ended without doing so.

    :param say: told when another run is in the way
    :return: what was removed, one line each
    :raise BedError: When something could not be.
    """
    directory = directory or default_directory()
    removed: list[str] = []
    problems: list[str] = []
    with _locked(directory, say):
        for path in sorted(directory.glob("*-*")):
            try:
                file = path.open("rb")
            except FileNotFoundError:  # its run has ended just now
                continue
            with file:
                if not _lock_when_over(file.fileno(), path.name):
                    continue  # its run goes on
                entries = list(_read(file.read()))
            present = [entry for entry in entries if Path(entry.path).exists()]
            left = _undo_all(entries)
            problems += left
            removed += [f"{entry.kind.value} {entry.path}" for entry in present]
            if not left:
                path.unlink(missing_ok=True)  # which its run does as well
    if problems:
        raise BedError("cannot remove what an earlier run left: " + "; ".join(problems))
    return removed


def _lock_when_over(fd: int, name: str) -> bool:
    """Lock the file of a run that has ended; False when it goes on.

    A process that the run was just starting when it was killed still holds the lock, and ends in a moment, as all of its
    processes do.
    """
    run = Path("/proc", name.partition("-")[0])
    deadline = time.monotonic() + _DYING_SECONDS
    while True:
        if try_lock(fd):
            return True
        if run.exists() or time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)


def _read(data: bytes) -> Iterator[_Entry]:
    """The entries of a file; its last line may be cut short."""
    for line in data.splitlines():
        try:
            yield msgspec.json.decode(line, type=_Entry)
        except msgspec.DecodeError:
            return


def _undo_all(entries: list[_Entry]) -> list[str]:
    problems = []
    for entry in reversed(entries):
        try:
            _UNDO[entry.kind](Path(entry.path))
        except OSError as error:
            problems.append(f"{entry.kind.value} {entry.path}: {error.strerror or error}")
    return problems


@contextmanager
def _locked(directory: Path, say: Say) -> Iterator[None]:
    """One process at a time looks at the directory: between making a file and locking it, it would look stale."""
    stack = ExitStack()
    try:
        directory.mkdir(mode=0o700, exist_ok=True)
        opened = stack.enter_context(private_directory(directory))
    except OSError as error:
        raise BedError(f"cannot use {directory}: {error.strerror}") from error
    except UnsafeError as error:
        raise BedError(str(error)) from error
    with stack:
        lock(opened, waiting=lambda: say(f"another run is at work in {directory}: waiting for it"))
        yield


def _remove_directory(path: Path) -> None:
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass


def _remove_swap(path: Path) -> None:
    """swapoff(2) fails with EINVAL when the file is no swap space in use."""
    _libc.swapoff(os.fsencode(path))
    path.unlink(missing_ok=True)


def _remove_mount(path: Path) -> None:
    mnt_detach = 2
    _libc.umount2(os.fsencode(path), mnt_detach)
    try:
        path.rmdir()
    except FileNotFoundError:
        pass


def _remove_cgroup(path: Path) -> None:
    """A group is removed when no process is in it; those that are there go back to the group above."""
    try:
        for pid in (path / "cgroup.procs").read_text().split():
            try:
                (path.parent / "cgroup.procs").write_text(pid)
            except ProcessLookupError:
                pass
        path.rmdir()
    except FileNotFoundError:
        pass


_UNDO: dict[EntryKind, Callable[[Path], None]] = {
    EntryKind.DIRECTORY: _remove_directory,
    EntryKind.SWAP: _remove_swap,
    EntryKind.CGROUP: _remove_cgroup,
    EntryKind.MOUNT: _remove_mount,
}
