"""`file:PATH`: a stream kept in a file. One way: there is nobody to answer."""

import os
from dataclasses import dataclass

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel, describe
from sterna.migration.errors import ChannelError, UriError

FORM = "file:PATH"


class FileChannel(Channel):
    """A file being written: `finish` makes it last; a channel closed before that removes what it wrote."""

    def __init__(self, cancellation: Cancellation, peer: str, path: str, fd: int) -> None:
        super().__init__(cancellation, peer, write_fd=fd)
        self._path = path
        self._finished = False

    def finish(self) -> None:
        assert self._write_fd is not None
        try:
            os.fsync(self._write_fd)
        except OSError as error:
            raise ChannelError(f"syncing {self.peer}: {describe(error)}") from error
        self._finished = True

    def close(self) -> None:
        if not self._closed and not self._finished and os.path.isfile(self._path):
            os.unlink(self._path)  # half a stream is of no use to anyone
        super().close()


@dataclass(frozen=True)
class FileUri:
    """:ivar path: of the file; written anew by a source, read by a destination"""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path}"

    def connect(self, cancellation: Cancellation) -> Channel:
        """Open the file for writing.

        :raise ChannelError: When it cannot be created.
        """
        try:
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ChannelError(f"cannot write {self}: {describe(error)}") from error
        return FileChannel(cancellation, str(self), self.path, fd)

    def open_incoming(self, cancellation: Cancellation) -> Channel:
        """Open the file for reading.

        :raise ChannelError: When it cannot be opened.
        """
        try:
            fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ChannelError(f"cannot read {self}: {describe(error)}") from error
        return Channel(cancellation, str(self), read_fd=fd)


def parse(rest: str) -> FileUri:
    """Parse what follows `file:`.

    :raise UriError: When the path is empty or holds a zero byte.
    """
    if not rest or "\0" in rest:
        raise UriError(f"file: the path is missing or holds a zero byte; expected {FORM}")
    return FileUri(rest)
