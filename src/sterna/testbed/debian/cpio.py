"""An initramfs: a cpio archive in the `newc` format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst)."""

import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO

_ALIGNMENT = 4
_TRAILER = "TRAILER!!!"
_DIRECTORY_MODE = stat.S_IFDIR | 0o755


@dataclass(frozen=True)
class Entry:
    """A file, directory or symbolic link.

    :ivar mode: type and permissions, as in st_mode
    :ivar content: a file's bytes, a link's target
    """

    mode: int
    content: bytes = b""

    @classmethod
    def file(cls, content: bytes, permissions: int = 0o644) -> "Entry":
        """A regular file."""
        return cls(stat.S_IFREG | permissions, content)

    @classmethod
    def link(cls, target: str) -> "Entry":
        """A symbolic link."""
        return cls(stat.S_IFLNK | 0o777, target.encode())


def write(out: BinaryIO, entries: Mapping[str, Entry], mtime: int) -> None:
    """Write an archive; missing parent directories are added. The same entries make the same bytes.

    :param entries: by path without a leading slash
    :param mtime: every entry's, in seconds since the epoch
    """
    parents = {str(parent) for path in entries for parent in PurePosixPath(path).parents} - {"."}
    complete = dict.fromkeys(parents, Entry(_DIRECTORY_MODE))
    complete |= entries
    for inode, (path, entry) in enumerate(sorted(complete.items()), 1):
        _write_entry(out, inode, path, entry, mtime)
    _write_entry(out, 0, _TRAILER, Entry(0), 0)


def _write_entry(out: BinaryIO, inode: int, path: str, entry: Entry, mtime: int) -> None:
    name = path.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    # inode, mode, uid, gid, links, mtime, size, device and rdev as major and minor, length of the name, checksum (unused)
    numbers = (inode, entry.mode, 0, 0, links, mtime, len(entry.content), 0, 0, 0, 0, len(name), 0)
    header = b"070701" + b"".join(b"%08x" % number for number in numbers)
    for part in (header + name, entry.content):
        out.write(part + bytes(-len(part) % _ALIGNMENT))
