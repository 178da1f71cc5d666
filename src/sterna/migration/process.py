"""The peer's process, where it is on this host: what it states of itself, and the proof that it has ended."""

import os
import re
import select
import uuid
from pathlib import Path
from typing import Annotated

import msgspec

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 22
"""Of /proc/PID/stat: when the process started, in clock ticks since boot (proc(5))."""
_TOKEN = re.compile(r"sterna-[0-9a-f]{32}")


Number = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]


class ProcessIdentity(msgspec.Struct, frozen=True):
    """A process, so that nobody can take another for it.

    :ivar boot: the kernel's boot_id; a container has its host's
    :ivar namespace: inode number of the PID namespace that `pid` counts in
    :ivar start: when it started, in clock ticks since boot: a number that is given out again starts later
    :ivar fd: descriptor of a memory file that it holds for this connection alone
    :ivar token: that file's name; it tells the process from its twin on a host that was cloned
    """

    boot: str
    namespace: Number
    pid: Number
    start: Number
    fd: Number
    token: str


class OwnProcess:
    """What this process states of itself to one peer. The peer checks the token before the next step of the handover.

    :ivar identity: None where /proc does not tell
    """

    def __init__(self) -> None:
        self.identity: ProcessIdentity | None = None
        self._fd = -1
        token = f"sterna-{uuid.uuid4().hex}"
        try:
            self._fd = os.memfd_create(token)
            pid = os.getpid()
            self.identity = ProcessIdentity(_boot(), _namespace(), pid, _start(pid), self._fd, token)
        except (OSError, ValueError, IndexError):
            pass

    def close(self) -> None:
        """The peer has looked, or never will."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _boot() -> str:
    return _BOOT_ID.read_text().strip()


def _namespace() -> int:
    """
    :raise OSError: Also when /proc counts in another PID namespace than this process does: its numbers are then not ours.
    """
    if int(os.readlink("/proc/self")) != os.getpid():
        raise OSError("/proc is another PID namespace's")
    return os.stat("/proc/self/ns/pid").st_ino


def _start(pid: int) -> int:
    # The command's name, in parentheses, may hold anything; what follows its last parenthesis are fields 3 and on.
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return int(fields[_START_FIELD - 3])


class ProcessWatch:
    """A descriptor of a process that tells when it has ended (pidfd_open(2))."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fileno(self) -> int:
        """The descriptor, which polls readable when the process has ended; -1 when it was given back."""
        return self._fd

    @property
    def ended(self) -> bool:
        """Whether the process has ended. One that is stopped has not."""
        if self._fd < 0:
            return False
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Give the descriptor back; the watch tells nothing any more."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def watch(identity: ProcessIdentity | None) -> ProcessWatch | None:
    """Watch a process that stated its identity over a connection that is open.

    :return: None when it is on another host or in another PID namespace, is this process, or cannot be looked at
    """
    if identity is None or not 0 < identity.pid < 1 << 31 or identity.pid == os.getpid():
        return None
    if not _TOKEN.fullmatch(identity.token):
        return None
    try:
        if (identity.boot, identity.namespace) != (_boot(), _namespace()):
            return None
        fd = os.pidfd_open(identity.pid)
    except (OSError, ValueError):
        return None
    watching = ProcessWatch(fd)
    try:
        # The descriptor is of whoever has the number now; that it is the one who stated it, start and token tell.
        held = os.readlink(f"/proc/{identity.pid}/fd/{identity.fd}")
        same = _start(identity.pid) == identity.start and held == f"/memfd:{identity.token} (deleted)"
        if same and not watching.ended:
            return watching
    except (OSError, ValueError, IndexError):
        pass
    watching.close()
    return None
