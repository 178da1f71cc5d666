"""Where compiled kernels are kept between runs: files in a directory of the user's cache, named by what they are compiled from.

What is loaded from there is run. So the directory and each file have to be this user's own, and nobody else may be able to write
to them; they are looked at through descriptors, so that none can be exchanged between the look and the use.
"""

import errno
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sterna.host.private import UnsafeError, private_directory, read_private

_MANY = 1000
"""More files than that are not kept: each state of a kernel's sources has its own."""


_not_written: dict[str, bytes] = {}
_said: list[str] = []


def cache_directory() -> Path:
    """
    :raise OSError: When the user has no home.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "sterna-kernels"
    except RuntimeError as error:
        raise OSError(errno.ENOENT, str(error), base) from error


def read(name: str) -> bytes | None:
    """A file of the directory; None when there is none, or none that is this user's own."""
    if name in _not_written:
        return _not_written[name]
    try:
        with opened(make=False) as directory, _named(name):
            data = read_private(name, directory, cache_directory() / name)
            with suppress(OSError):
                os.utime(name, dir_fd=directory, follow_symlinks=False)  # those used last survive pruning
            return data
    except FileNotFoundError:
        return None
    except (OSError, UnsafeError) as error:
        _say_once(error)
        return None


def keep(name: str, data: bytes) -> None:
    """Have a file for this program only."""
    _not_written[name] = data


def write(name: str, data: bytes) -> None:
    """Keep a file, whole or not at all. Where that cannot be, it is said, once, and this program keeps it to itself."""
    draft = f".{uuid.uuid4().hex}"
    try:
        with opened() as directory, _named():
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with open(os.open(draft, flags, 0o600, dir_fd=directory), "wb") as file:
                    file.write(data)
                os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
                _prune(directory)
            except OSError:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=directory)
                raise
    except (OSError, UnsafeError) as error:
        keep(name, data)
        _say_once(error)


@contextmanager
def opened(*, make: bool = True) -> Iterator[int]:
    """A descriptor of the directory.

    :param make: make it unless it is there
    :raise OSError: When it cannot be had.
    :raise UnsafeError: When it is not this user's own.
    """
    path = cache_directory()
    if make:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(0o700, exist_ok=True)
    with private_directory(path) as directory:
        yield directory


@contextmanager
def _named(name: str = "") -> Iterator[None]:
    """What the operating system says of a file in the directory has its path; else it has the name alone, or none at all."""
    try:
        yield
    except OSError as error:
        error.filename = str(cache_directory() / name)
        raise


def _say_once(error: Exception) -> None:
    if not _said:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        _said.append(f"kernels have to be compiled anew: {why}")
        print(f"sterna: {_said[0]}", file=sys.stderr, flush=True)


def _prune(directory: int) -> None:
    """Forget the files that were used least lately, when there are many."""
    names = os.listdir(directory)
    if len(names) > _MANY:

        def used(name: str) -> float:
            try:
                return os.stat(name, dir_fd=directory, follow_symlinks=False).st_mtime
            except FileNotFoundError:
                return 0.0

        for name in sorted(names, key=used)[: len(names) - _MANY // 2]:
            with suppress(OSError):
                os.unlink(name, dir_fd=directory)
