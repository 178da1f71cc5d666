"""What Debian packages hold."""

import io
import lzma
import posixpath
import stat
import subprocess
import tarfile
from collections import UserDict
from collections.abc import Iterator, Mapping
from pathlib import Path

from sterna.testbed.debian.cpio import Entry
from sterna.testbed.errors import ImageError

Tree = dict[str, Entry]
"""Files by their path, without a leading slash."""

MERGED = ("bin/", "sbin/", "lib/")
"""Folders that are links into /usr since Debian 12; some packages still have files there."""

_XZ_MAGIC = b"\xfd7zXZ\0"


def unpack(path: Path) -> Iterator[tuple[str, Entry]]:
    """The files and links of a package, by the paths that they have where / is merged with /usr.

    :raise ImageError: When it is none.
    """
    try:
        data = subprocess.run(
            ["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ImageError(f"cannot unpack {path.name}: {error}") from error
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive:
            name = posixpath.normpath(member.name)
            if name.startswith(MERGED):
                name = f"usr/{name}"
            if member.issym():
                yield name, Entry.link(member.linkname)
            elif member.isfile() or member.islnk():
                content = archive.extractfile(member)
                assert content is not None
                yield name, Entry.file(content.read(), member.mode & 0o777)


def kernel_of(path: Path) -> tuple[bytes, Mapping[str, bytes]]:
    """The kernel in a package, and its modules by path, uncompressed: busybox loads no others.

    :raise ImageError: When there is none.
    """
    files = dict(unpack(path))
    kernels = [name for name in files if name.startswith("boot/vmlinuz")]
    if not kernels:
        raise ImageError(f"{path.name} holds no boot/vmlinuz")
    modules = {name: entry.content for name, entry in files.items() if name.endswith((".ko", ".ko.xz"))}
    return files[kernels[0]].content, _Modules({name.removesuffix(".xz"): modules[name] for name in modules})


class _Modules(UserDict[str, bytes]):
    """Each is decompressed when it is asked for: of the thousands in a package few are."""

    def __getitem__(self, path: str) -> bytes:
        content = super().__getitem__(path)
        return lzma.decompress(content) if content.startswith(_XZ_MAGIC) else content


def system_files(*folders: str) -> Tree:
    """What each root file system has, whatever else is in it.

    :param folders: empty ones that it has besides
    """
    tree = {name.rstrip("/"): Entry.link(f"usr/{name.rstrip('/')}") for name in MERGED}
    tree |= {name: Entry(stat.S_IFDIR | 0o755) for name in ("dev", "proc", "sys", "run", *folders)}
    tree["tmp"] = Entry(stat.S_IFDIR | 0o1777)
    tree["etc/passwd"] = Entry.file(b"root:x:0:0:root:/root:/bin/sh\n")
    tree["etc/group"] = Entry.file(b"root:x:0:\n")
    return tree
