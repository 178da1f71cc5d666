"""Keeping what went through the proxy: a directory as `sterna.analysis.capture` reads it."""

import contextlib
import errno
import os
import threading
from collections import Counter
from pathlib import Path

from sterna.analysis.proxy.connection import Connection, ConnectionKind
from sterna.analysis.proxy.tee import TeeReader
from sterna.host.newfile import NewFile
from sterna.migration.errors import MigrationError
from sterna.stream.multifd.format import CHANNEL_LIMIT

_NAMES = {
    ConnectionKind.MAIN: "main",
    ConnectionKind.CHANNEL: "channel",
    ConnectionKind.QUESTION: "question",
    ConnectionKind.OTHER: "other",
}
_CHUNK = 256 << 10
_MOST = {ConnectionKind.CHANNEL: CHANNEL_LIMIT}
_MOST_OTHERS = 64
"""Connections of a kind that are recorded: a migration has one main stream; what else connects need not end."""


class RecordingError(MigrationError):
    """A recording cannot be begun."""


class Recording:
    """Files ``main.stream``, ``channel-0.stream`` and so on; what came back, if anything did, has ``.return`` in place of
    ``.stream``.

    Writing is apart from forwarding, and its failure does not touch it. A file has its name when all that it is to hold is in
    it, also of a migration that was cut; one that could not be written to its end is not there.

    :param directory: made if it is not there, but not those above it; only its owner may look into it then
    :raise RecordingError: When nothing can be recorded there, or something is there already.

    :ivar fault: why a file could not be written, if one could not
    :ivar threads: those that write. Once all connections have ended there are no more, and each ends with its file
    """

    def __init__(self, directory: Path) -> None:
        self.fault = ""
        self._directory = directory
        self._made = _make(directory)
        self._counts: Counter[ConnectionKind] = Counter()
        self.threads: list[threading.Thread] = []
        self._lock = threading.Lock()

    def start(self, connection: Connection, forward: TeeReader, back: TeeReader) -> None:
        """Record a connection whose kind is known.

        :param forward: of all that goes forward
        :param back: of all that comes back
        """
        with self._lock:
            number = self._counts[connection.kind]
            if number >= _MOST.get(connection.kind, _MOST_OTHERS):
                forward.close()
                back.close()
                return
            self._counts[connection.kind] += 1
            stem = _NAMES[connection.kind]
            if connection.kind is not ConnectionKind.MAIN:
                stem += f"-{number}"
            elif number:
                stem += f"-{number + 1}"
            self.threads = [other for other in self.threads if other.is_alive()]
            for name, reader in ((f"{stem}.stream", forward), (f"{stem}.return", back)):
                thread = threading.Thread(
                    target=self._write, args=(name, reader), name="proxy-record", daemon=True
                )
                try:
                    thread.start()
                except RuntimeError as error:  # the operating system has no thread to spare
                    self.fault = f"{name}: {error}"
                    reader.close()
                else:
                    self.threads.append(thread)

    def _write(self, name: str, reader: TeeReader) -> None:
        buffer = memoryview(bytearray(_CHUNK))
        try:
            if not (got := reader.readinto(buffer)):
                return
            with NewFile(self._directory / name, private=True) as file:
                while got:
                    file.write(buffer[:got])
                    got = reader.readinto(buffer)
                file.commit()
        except OSError as error:
            self.fault = f"{name}: {error.strerror or error}"
        finally:
            reader.close()

    def close(self) -> None:
        """Remove the directory again when it was made here and nothing was recorded."""
        if self._made:
            with contextlib.suppress(OSError):
                self._directory.rmdir()


def _make(directory: Path) -> bool:
    """Have an empty directory at a path: whether it had to be made.

    :raise RecordingError: When that cannot be.
    """
    wanted = "a recording needs an empty directory, or the name of a new one"
    try:
        directory.mkdir(0o700)
        return True
    except FileExistsError:
        pass
    except FileNotFoundError as error:
        raise RecordingError(
            f"{directory}: there is no {directory.parent} to make it in; {wanted}"
        ) from error
    except OSError as error:
        raise RecordingError(f"{directory}: {error.strerror}; {wanted}") from error
    try:
        if any(directory.iterdir()):
            raise RecordingError(f"{directory}: there is something in it; {wanted}")
        if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except NotADirectoryError as error:
        raise RecordingError(f"{directory}: it is a file; {wanted}") from error
    except OSError as error:
        raise RecordingError(f"{directory}: {error.strerror}; {wanted}") from error
    return False
