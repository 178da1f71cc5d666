"""What Debian packages hold."""

import io
import lzma
import posixpath
import subprocess
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from sterna.testbed.debian.cpio import Entry
from sterna.testbed.debian.errors import ImageError

Tree = dict[str, Entry]
"""Files by their path, without a leading slash."""

MERGED = ("bin/", "sbin/", "lib/")
"""Folders that are links into /usr since Debian 12; some packages still have files there."""


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
            name = _merge(posixpath.normpath(member.name))
            if member.issym():
                yield name, Entry.link(member.linkname)
            elif member.isfile() or member.islnk():
                content = archive.extractfile(member)
                assert content is not None
                yield name, Entry.file(content.read(), member.mode & 0o777)


def kernel_of(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """The kernel in a package, and its modules by path, uncompressed: busybox loads no others.

    :raise ImageError: When there is none.
    """
    files = dict(unpack(path))
    kernels = [name for name in files if name.startswith("boot/vmlinuz")]
    if not kernels:
        raise ImageError(f"{path.name} holds no boot/vmlinuz")
    return files[kernels[0]].content, _modules(files)


def _modules(files: Mapping[str, Entry]) -> dict[str, bytes]:
    modules = {}
    for path, entry in files.items():
        if path.endswith(".ko"):
            modules[path] = entry.content
        elif path.endswith(".ko.xz"):
            modules[path.removesuffix(".xz")] = lzma.decompress(entry.content)
    return modules


def _merge(path: str) -> str:
    return f"usr/{path}" if path.startswith(MERGED) else path
