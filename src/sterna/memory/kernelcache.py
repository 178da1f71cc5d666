"""Where compiled kernels are kept between runs: a directory named after the contents of all that they are compiled from, so that
an edit, or an upgrade, never runs old code.

What is loaded from there is run. So the directory, the one above it and each file have to be this user's own, and nobody else may
be able to write to them; they are looked at through descriptors, so that none can be exchanged between the look and the use.
"""

import errno
import functools
import hashlib
import importlib.util
import math
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sterna import STARTED

_KEPT = 8
"""Directories that survive when a new one is made: other checkouts and versions may be using theirs."""
_MARKS = (b"import numba", b"from numba", b"@kernel")
"""How a file shows that it is compiled; one that only speaks of the compiler is not."""
_COMPILED_WITH = ("numba", "llvmlite", "numpy", "unicorn")
"""Distributions whose constants and calling conventions end up in compiled code."""
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


_not_written: dict[str, bytes] = {}
_said: list[str] = []


class UnsafeError(Exception):
    """Somebody else could have put code there, or it may be of other sources."""


def source_digest(package: Path, unchanged_since: float = math.inf) -> str:
    """Digest of all that compiled code depends on: every source file of each subpackage that holds some, and the versions of the
    libraries it was compiled with.

    :param unchanged_since: a time as `time.time` has it
    :raise UnsafeError: When a file has changed since.
    """
    digest = hashlib.sha256()
    for subpackage in sorted(entry.name for entry in os.scandir(package) if entry.is_dir()):
        sources = sorted(
            os.path.join(folder, name)
            for folder, _, names in os.walk(package / subpackage)
            for name in names
            if name.endswith(".py")
        )
        texts = [Path(path).read_bytes() for path in sources]
        if any(mark in text for text in texts for mark in _MARKS):
            for path, text in zip(sources, texts, strict=True):
                if os.stat(path).st_ctime > unchanged_since:
                    raise UnsafeError(f"{path} has changed since this program began")
                digest.update(f"{os.path.relpath(path, package)}\0{len(text)}\0".encode() + text)
    for name in _COMPILED_WITH:
        digest.update(f"{name} {_version(name)}\0".encode())
    return digest.hexdigest()[:16]


def _version(name: str) -> str:
    """A distribution's version, or nothing: by the names beside its package, as importlib.metadata takes its time to load."""
    package = importlib.util.find_spec(name)
    if package is None or package.origin is None:
        return ""
    beside = os.listdir(Path(package.origin).parent.parent)
    if found := sorted(one for one in beside if one.startswith(f"{name}-") and one.endswith("-info")):
        return " ".join(found)
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return ""


@functools.cache
def program_digest() -> str:
    """`source_digest` of what this program was loaded from.

    :raise UnsafeError: When that cannot be told, as it has changed since.
    """
    return source_digest(Path(__file__).resolve().parent.parent, STARTED)


def cache_directory() -> Path:
    """The directory for this state of the sources.

    :raise OSError: When the user has no home.
    :raise UnsafeError: When the sources are no longer those of this program.
    """
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(base).expanduser() / "sterna" / program_digest()
    except RuntimeError as error:
        raise OSError(errno.ENOENT, str(error), base) from error  # a user without a home


def read(name: str) -> bytes | None:
    """A file of the directory; None when there is none, or none that is this user's own."""
    if name in _not_written:
        return _not_written[name]
    try:
        with opened(make=False) as directory:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
            with open(fd, "rb") as file:
                _check(fd, f"{cache_directory()}/{name}", stat.S_ISREG)
                return file.read()
    except FileNotFoundError:
        return None
    except (OSError, UnsafeError) as error:
        _say_once(error)
        return None


def write(name: str, data: bytes) -> None:
    """Keep a file, whole or not at all. Where that cannot be, it is said, once, and this program keeps it to itself."""
    draft = f".{uuid.uuid4().hex}"
    try:
        with opened() as directory:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                with open(os.open(draft, flags, 0o600, dir_fd=directory), "wb") as file:
                    file.write(data)
                os.rename(draft, name, src_dir_fd=directory, dst_dir_fd=directory)
            except OSError:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=directory)
                raise
    except (OSError, UnsafeError) as error:
        _not_written[name] = data
        _say_once(error)


@contextmanager
def opened(*, make: bool = True) -> Iterator[int]:
    """A descriptor of the directory.

    :param make: make it unless it is there
    :raise OSError: When it cannot be had.
    :raise UnsafeError: When it, or the one above it, is not this user's own.
    """
    path = cache_directory()
    if make:
        path.parent.parent.mkdir(parents=True, exist_ok=True)
    with _directory(path.parent, None, make) as parent, _directory(path, parent, make) as directory:
        yield directory


@contextmanager
def _directory(path: Path, parent: int | None, make: bool) -> Iterator[int]:
    where = str(path) if parent is None else path.name
    if make:
        try:
            os.mkdir(where, 0o700, dir_fd=parent)
        except FileExistsError:
            pass
        else:
            if parent is not None:
                _prune(path.parent, path.name)
    try:
        fd = os.open(where, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except NotADirectoryError:
        raise UnsafeError(f"{path} is no directory, or a link") from None
    try:
        _check(fd, str(path), stat.S_ISDIR)
        yield fd
    finally:
        os.close(fd)


def _check(fd: int, path: str, is_right: Callable[[int], bool]) -> None:
    """Whether only this user can have written to an open file.

    :raise UnsafeError: When another could.
    """
    found = os.fstat(fd)
    if not is_right(found.st_mode):
        raise UnsafeError(f"{path} is of another kind")
    if found.st_uid != os.geteuid():
        raise UnsafeError(f"{path} belongs to user {found.st_uid}, not to {os.geteuid()}")
    if found.st_mode & _OTHERS_WRITE:
        raise UnsafeError(f"others may write to {path} (chmod go-w)")


def _say_once(error: Exception) -> None:
    if not _said:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
        _said.append(f"kernels are compiled by each program anew: {why}")
        print(f"sterna: {_said[0]}", file=sys.stderr, flush=True)


def _prune(parent: Path, made: str) -> None:
    others = (path for path in parent.iterdir() if path.name != made)
    for path in sorted(others, key=lambda path: path.lstat().st_mtime, reverse=True)[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
