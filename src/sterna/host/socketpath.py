"""The paths of Unix sockets: whoever made one removes it, and nothing else that is there by then."""

import errno
import os
import socket
import stat
from dataclasses import dataclass

_PROBE_SECONDS = 1.0


@dataclass(frozen=True)
class SocketPath:
    """A path that a socket was bound to.

    :ivar identity: device and inode of the file; the number is not given to another file while the socket is open
    """

    path: str
    identity: tuple[int, int]

    @classmethod
    def bind(cls, sock: socket.socket, path: str) -> "SocketPath":
        """Bind a stream socket to a path. A socket that nobody listens on any more, left by a process that was killed, is
        replaced.

        :raise OSError: When the path is taken, or cannot be made; its text says what is there.
        """
        try:
            sock.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise
            if (reason := what_is_no_socket(path)) is not None:
                raise OSError(errno.EADDRINUSE, reason) from error
            if not _is_stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        found = os.lstat(path)
        return cls(path, (found.st_dev, found.st_ino))

    def remove(self) -> None:
        """Remove the path, unless somebody else has put his own there. To be called before the socket is closed."""
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self.identity:
                os.unlink(self.path)
        except OSError:
            pass  # somebody else cleaned up


def what_is_no_socket(path: str) -> str | None:
    """What is at a path where a socket is wanted, in words; None when a socket is there, or nothing."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    return None if stat.S_ISSOCK(mode) else f"it is a {_KINDS.get(stat.S_IFMT(mode), 'device')}, not a socket"


_KINDS = {stat.S_IFDIR: "directory", stat.S_IFREG: "regular file", stat.S_IFIFO: "pipe"}


def _is_stale(path: str) -> bool:
    """Whether nobody listens on a socket's path."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(_PROBE_SECONDS)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False
