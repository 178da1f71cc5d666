"""Where compiled kernels are kept between runs.

numba keeps a kernel's machine code with the time stamp of its own source file, not of the files of the kernels it calls, which
are compiled into it. A directory named after the contents of all of them keeps an edit, or an upgrade, from running old code.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

_KEPT = 4
"""Directories that survive when a new one is made: other checkouts and versions may be using theirs."""
_MARKS = (b"numba", b"@kernel")


def source_digest(package: Path) -> str:
    """Digest of every source file of a package that holds compiled code."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        text = path.read_bytes()
        if any(mark in text for mark in _MARKS):
            digest.update(str(path.relative_to(package)).encode() + b"\0" + text)
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
            return directory
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="sterna-kernels-"))
