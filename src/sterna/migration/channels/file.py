"""`file:PATH`: a stream kept in a file. One way: there is nobody to answer."""

import shlex
from dataclasses import dataclass

from sterna.host.newfile import NewFile, NotAFileError, UnsyncedError, open_for_reading
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel, describe
from sterna.migration.errors import ChannelError, Unsynced, UriError

FORM = "file:PATH"


class FileChannel(Channel):
    """A file being written: `finish` puts it in its place, on the disk; closed before that, it was never there."""

    def __init__(self, cancellation: Cancellation, peer: str, file: NewFile) -> None:
        super().__init__(cancellation, peer, write_fd=file.fileno(), owner=file)
        self._file = file

    def finish(self) -> None:
        """
        :raise Unsynced: When all that failed is to write its directory to the disk.
        """
        self._write_fd = None
        try:
            self._file.commit()
        except OSError as error:
            kind = Unsynced if isinstance(error, UnsyncedError) else ChannelError
            raise kind(f"completing {self.peer}: {describe(error)}") from error


@dataclass(frozen=True)
class FileUri:
    """:ivar path: of the file; written anew by a source, read by a destination"""

    path: str

    def __str__(self) -> str:
        return f"file:{self.path}"

    def connect(self, cancellation: Cancellation) -> Channel:
        """Begin a file; one that is there stays until the new one is finished.

        :raise ChannelError: When it cannot be created.
        """
        try:
            file = NewFile(self.path, private=True)
        except OSError as error:
            raise ChannelError(f"cannot write {self}: {self._cause(error, 'cat >')}") from error
        return FileChannel(cancellation, str(self), file)

    def open_incoming(self, cancellation: Cancellation) -> Channel:
        """Open the file for reading.

        :raise ChannelError: When it cannot be opened.
        """
        try:
            fd = open_for_reading(self.path)
        except OSError as error:
            raise ChannelError(f"cannot read {self}: {self._cause(error, 'cat')}") from error
        return Channel(cancellation, str(self), read_fd=fd)

    def _cause(self, error: OSError, command: str) -> str:
        if isinstance(error, NotAFileError) and error.takes_bytes:
            return f"{error.strerror}; use exec:{command} {shlex.quote(self.path)}"
        return describe(error)


def parse(rest: str) -> FileUri:
    """Parse what follows `file:`.

    :raise UriError: When the path is empty or holds a zero byte.
    """
    if not rest or "\0" in rest:
        raise UriError(f"file: the path is missing or holds a zero byte; expected {FORM}")
    return FileUri(rest)
