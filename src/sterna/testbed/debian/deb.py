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

_XZ = ".xz"


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


def kernel_of(path: Path) -> tuple[bytes, Mapping[str, bytes]]:
    """The kernel in a package, and its modules by path, uncompressed: busybox loads no others.

    :raise ImageError: When there is none.
    """
    files = dict(unpack(path))
    kernels = [name for name in files if name.startswith("boot/vmlinuz")]
    if not kernels:
        raise ImageError(f"{path.name} holds no boot/vmlinuz")
    return files[kernels[0]].content, _Modules(files)


class _Modules(Mapping[str, bytes]):
    """Each is decompressed when it is asked for: of the thousands in a package few are."""

    def __init__(self, files: Mapping[str, Entry]) -> None:
        self._files = {
            path.removesuffix(_XZ): (entry.content, path.endswith(_XZ))
            for path, entry in files.items()
            if path.endswith((".ko", f".ko{_XZ}"))
        }

    def __getitem__(self, path: str) -> bytes:
        content, compressed = self._files[path]
        return lzma.decompress(content) if compressed else content

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _merge(path: str) -> str:
    return f"usr/{path}" if path.startswith(MERGED) else path
