"""Files and directories that only this user can have written to: what is done with them cannot be another's doing."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sterna.host.errors import HostError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


class UnsafeError(HostError):
    """Somebody else could have put there what is there, or have chosen where it leads to."""


@contextmanager
def private_directory(path: Path) -> Iterator[int]:
    """A descriptor of this user's own directory.

    :raise OSError: When it cannot be opened.
    :raise UnsafeError: When it is a link, another user's, or one that others can write to.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except NotADirectoryError:
        raise UnsafeError(f"{path} is a link, or no directory") from None
    try:
        _check(fd, path)
        yield fd
    finally:
        os.close(fd)


def read_private(name: str, directory: int, path: Path) -> bytes:
    """The content of this user's own file.

    :param directory: the descriptor that `name` is looked up in
    :param path: of both, for people
    :raise OSError: When it cannot be read.
    :raise UnsafeError: When it is a link, no regular file, another user's, or one that others can write to.
    """
    try:
        fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise UnsafeError(f"{path} is a link") from None
        raise
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise UnsafeError(f"{path} is no regular file")
        _check(fd, path)
        return file.read()


def _check(fd: int, path: Path) -> None:
    found = os.fstat(fd)
    if found.st_uid != os.geteuid():
        raise UnsafeError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & _OTHERS_WRITE:
        raise UnsafeError(f"others may write to {path} (chmod go-w)")
