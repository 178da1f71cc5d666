"""Where compiled kernels are kept between runs.

numba keeps a kernel's machine code with the time stamp of its own source file, not of the files of the kernels it calls, which
are compiled into it, nor of the layouts and constants it was compiled with. A directory named after the contents of all of
them keeps an edit, or an upgrade, from running old code.
"""

import functools
import hashlib
import os
import shutil
import tempfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_KEPT = 8
"""Directories that survive when a new one is made: other checkouts and versions may be using theirs."""
_MARKS = (b"import numba", b"from numba", b"@kernel")
"""How a file shows that it is compiled; one that only speaks of the compiler is not."""
_COMPILED_WITH = ("numba", "llvmlite", "numpy", "unicorn")
"""Distributions whose constants and calling conventions end up in compiled code."""


def source_digest(package: Path) -> str:
    """Digest of all that compiled code depends on: every source file of each subpackage that holds some, and the versions of the
    libraries it was compiled with.
    """
    sources = {path.relative_to(package): path.read_bytes() for path in package.rglob("*.py")}
    compiled = {path.parts[0] for path, text in sources.items() if any(mark in text for mark in _MARKS)}
    digest = hashlib.sha256()
    for path, text in sorted(sources.items()):
        if path.parts[0] in compiled:
            digest.update(f"{path}\0{len(text)}\0".encode() + text)
    for name in _COMPILED_WITH:
        try:
            digest.update(f"{name} {version(name)}\0".encode())
        except PackageNotFoundError:
            pass
    return digest.hexdigest()[:16]


def _prune(parent: Path) -> None:
    others = sorted(parent.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in others[_KEPT:]:
        shutil.rmtree(path, ignore_errors=True)


def cache_directory(package: Path) -> Path:
    """The directory for this state of the sources, made if need be; a temporary one where the user's cache cannot be written."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    parent = Path(base).expanduser() / "sterna"
    directory = parent / source_digest(package)
    try:
        if not directory.is_dir():
            directory.mkdir(parents=True, exist_ok=True)
            _prune(parent)
        if os.access(directory, os.W_OK):
            os.utime(directory)  # the ones used last survive pruning
            return directory
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="sterna-kernels-"))


@functools.cache
def kernel_directory() -> Path:
    """Where this program's kernels are: one place for as long as it runs."""
    told = os.environ.get("NUMBA_CACHE_DIR")
    return Path(told) if told else cache_directory(Path(__file__).resolve().parent.parent)
