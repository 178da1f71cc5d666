"""The paths of listening Unix sockets: whoever made one removes it, and nothing else that is there by then."""

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class SocketPath:
    """A path that a socket was bound to.

    :ivar identity: device and inode of the file; the number is not given to another file while the socket is open
    """

    path: str
    identity: tuple[int, int]

    @classmethod
    def bound(cls, path: str | os.PathLike[str]) -> "SocketPath":
        """
        :param path: to which a socket has just been bound
        :raise OSError: When it is gone already.
        """
        found = os.lstat(path)
        return cls(os.fspath(path), (found.st_dev, found.st_ino))

    def remove(self) -> None:
        """Remove the path, unless somebody else has put his own there. To be called before the socket is closed."""
        try:
            found = os.lstat(self.path)
            if (found.st_dev, found.st_ino) == self.identity:
                os.unlink(self.path)
        except OSError:
            pass  # somebody else cleaned up
