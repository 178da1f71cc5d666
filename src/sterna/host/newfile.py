"""Files that take their place only when they are complete.

A `NewFile` is written under a name of its own in the directory where it belongs. Until it is committed, what was
there before stays as it was, byte for byte; a file that is given up, or cannot be written to its end, leaves nothing.
Symbolic links are followed: the link stays, and what it leads to is replaced.

What a rename cannot replace is refused before anything is done: named pipes, sockets, devices, and the names of
open descriptors (``/dev/stdout``). A file without a name, which only its descriptor leads to (a memory file, or one that was
unlinked), is written in place: whoever made it made it for this. Nothing here waits for another process.
"""

import contextlib
import errno
import os
import re
import stat

from sterna.host.closing import Closing
from sterna.host.errors import HostError

_Path = str | os.PathLike[str]

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFDIR: "a directory",
}
_DESCRIPTORS = re.compile(r"/proc/[^/]+(/task/[^/]+)?/fd")
_MOST_LINKS = 40
"""As many as the kernel follows (path_resolution(7))."""


class NotAFileError(HostError, OSError):
    """A path leads to something else than a regular file; `strerror` says to what.

    :ivar takes_bytes: whether a program that is given the path can write into it or read from it
    """

    def __init__(self, path: str, kind: str) -> None:
        number = errno.EISDIR if kind == _KINDS[stat.S_IFDIR] else errno.EINVAL
        super().__init__(number, f"it is {kind}, not a regular file", path)
        self.takes_bytes = number != errno.EISDIR


class UnsyncedError(HostError, OSError):
    """A file is complete and has taken its place, but whether that outlasts a power failure is not known; `strerror` says so."""

    def __init__(self, cause: OSError) -> None:
        super().__init__(
            cause.errno,
            "it is in its place, but a power failure may undo that: its directory cannot be written to the disk: "
            f"{cause.strerror}",
        )


class NewFile(Closing):
    """A file being written. `with` gives it up unless it was committed.

    :param path: where it belongs; a file that is there must be writable
    :param private: it holds guest RAM: only its owner may read it, whatever file it replaces
    :raise NotAFileError: When something else than a regular file is there.
    :raise OSError: When it cannot be created there; what is there has not been touched.
    """

    def __init__(self, path: _Path, *, private: bool) -> None:
        self._fd: int | None = None
        self._directory: int | None = None
        if _is_unnamed(path):
            self._own_name = ""
            self._fd = os.open(path, os.O_WRONLY | os.O_TRUNC | os.O_NONBLOCK | os.O_CLOEXEC)
            return
        target, old = _locate(path)
        directory, self._name = os.path.split(target)
        self._own_name = f".sterna-{os.urandom(8).hex()}.part"
        self._directory = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._fd = os.open(self._own_name, flags, 0o600 if private else 0o666, dir_fd=self._directory)
            if private:
                os.fchmod(self._fd, 0o600)
            elif old is not None:
                os.fchmod(self._fd, stat.S_IMODE(old.st_mode))
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        """The descriptor to write to."""
        assert self._fd is not None, "the file is closed"
        return self._fd

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data` at the end.

        :raise OSError: When there is no room, or the file system fails.
        """
        view = memoryview(data).cast("B")
        while view:
            view = view[os.write(self.fileno(), view) :]

    def commit(self) -> None:
        """The file is complete: it is on the disk, in its place, when this returns.

        :raise UnsyncedError: When it is in its place, and the directory cannot be written to the disk.
        :raise OSError: When it cannot be had there; what was there before still is.
        """
        fd, directory = self.fileno(), self._directory
        try:
            os.fsync(fd)
            self._fd = None
            os.close(fd)
            if directory is None:
                return
            os.rename(self._own_name, self._name, src_dir_fd=directory, dst_dir_fd=directory)
            self._own_name = ""
            try:
                os.fsync(directory)
            except OSError as error:
                # Some file systems write a directory with its files, and cannot be asked to.
                if error.errno != errno.EINVAL:
                    raise UnsyncedError(error) from error
        finally:
            self.close()

    def close(self) -> None:
        """Give the file up, unless it was committed. Idempotent."""
        fd, self._fd = self._fd, None
        directory, self._directory = self._directory, None
        if fd is not None:
            with contextlib.suppress(OSError):
                os.close(fd)
        if directory is not None:
            if self._own_name:
                with contextlib.suppress(OSError):
                    os.unlink(self._own_name, dir_fd=directory)
            os.close(directory)


def write_report(path: _Path, data: bytes) -> None:
    """Write what is not secret: a file in one piece, or into a character device or an open descriptor that `path` names.

    :raise NotAFileError: When something else is there.
    :raise OSError: When it cannot be written.
    """
    if not _is_stream(os.fspath(path)):
        with NewFile(path, private=False) as file:
            file.write(data)
            file.commit()
        return
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    os.set_blocking(fd, True)
    with os.fdopen(fd, "wb") as out:
        out.write(data)


def check_report(path: _Path) -> None:
    """Whether `write_report` can be expected to write there; nothing is opened for long, and nothing changed.

    :raise OSError: When it cannot; as `write_report`.
    """
    name = os.fspath(path)
    if _is_stream(name):
        where = name
    else:
        where = os.path.dirname(_locate(name)[0])
        os.stat(where)
    if not os.access(where, os.W_OK, effective_ids=True):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)


def open_for_reading(path: _Path) -> int:
    """Open what can be read without waiting for another process: a file or a device.

    :return: a descriptor that does not block
    :raise NotAFileError: When it is a named pipe, a socket or a directory.
    :raise OSError: When it cannot be opened.
    """
    name = _checked(path)
    # Before it is opened: whoever waits to write into a pipe would take the opening for a reader's.
    _refuse(os.stat(name), name, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFDIR)
    return os.open(name, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)


def _locate(path: _Path) -> tuple[str, os.stat_result | None]:
    """Where a file belongs, all links followed, and what is there now.

    :raise OSError: When no file can be there, or the one that is there may not be written.
    """
    name = _checked(path)
    try:
        old = os.stat(name)
    except FileNotFoundError:
        if name.endswith("/"):
            raise NotAFileError(name, _KINDS[stat.S_IFDIR]) from None
        return os.path.realpath(name), None
    _refuse(old, name, *_KINDS)
    if _is_descriptor(name):
        raise NotAFileError(name, "the name of an open descriptor")
    # It is replaced, not written into: but who may not write it shall not replace it either.
    os.close(os.open(name, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    return os.path.realpath(name), old


def _checked(path: _Path) -> str:
    name = os.fspath(path)
    try:
        encoded = os.fsencode(name)
    except ValueError:
        encoded = b"\0"
    if b"\0" in encoded:
        raise OSError(errno.EINVAL, "it is not a file name", ascii(name)[:200])
    if not name:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
    return name


def _refuse(found: os.stat_result, path: str, *kinds: int) -> None:
    kind = stat.S_IFMT(found.st_mode)
    if kind in kinds:
        raise NotAFileError(path, _KINDS[kind])


def _is_stream(path: str) -> bool:
    """Whether bytes are handed on through `path` at once: a character device, or a descriptor that somebody opened."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return False
    return stat.S_ISCHR(found.st_mode) or _is_descriptor(path)


def _is_unnamed(path: _Path) -> bool:
    """Whether only a descriptor leads to a regular file: it has no name that a rename could give to another."""
    name = _checked(path)
    try:
        found = os.stat(name)
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and not found.st_nlink and _is_descriptor(name)


def _is_descriptor(path: str) -> bool:
    """Whether a name, or a link on its way, stands for an open descriptor: /dev/stdout, /dev/fd/3, /proc/1/fd/3."""
    for _ in range(_MOST_LINKS):
        directory = os.path.realpath(os.path.dirname(path) or ".")
        if _DESCRIPTORS.fullmatch(directory):
            return True
        try:
            path = os.path.join(directory, os.readlink(path))
        except OSError:
            return False
    return False
