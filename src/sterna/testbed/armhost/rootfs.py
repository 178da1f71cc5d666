"""The host's root file system, what Debian packages and wheels hold, less what nothing there reads; and its kernel."""

import re
import zipfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from sterna.testbed.armhost.packages import Packages
from sterna.testbed.armhost.recipe import KERNEL_MODULES
from sterna.testbed.debian.cpio import Entry
from sterna.testbed.debian.deb import Tree, kernel_of, system_files, unpack
from sterna.testbed.debian.kernelmodules import load_order

SITE = "usr/lib/python3/dist-packages"
_UNREAD = re.compile(
    r"usr/share/(?!misc/|media-types)|usr/lib/aarch64-linux-gnu/(gconv|perl)|.*/__pycache__/|.*\.(pyi|pyx|pxd|a|h|hpp)$"
    r"|usr/lib/python3\.\d+/(test|idlelib|lib2to3|tkinter|turtledemo|ensurepip|pydoc_data|config-)"
    rf"|{SITE}/numpy/(.*/tests/|f2py/|_core/include/)"
)
_MODULES_FILE = "etc/sterna/modules"


def build(packages: Packages) -> Tree:
    """The file system by path, without what depends on the kernel.

    :raise ImageError: When a package is not as expected.
    """
    tree: Tree = {}
    for deb in packages.debs:
        tree.update((path, entry) for path, entry in unpack(deb) if not _UNREAD.match(path))
    for wheel in packages.wheels:
        tree.update((path, entry) for path, entry in _unpack_wheel(wheel) if not _UNREAD.match(path))
    tree |= system_files("root")
    tree["usr/bin/sh"] = Entry.link("busybox")
    tree["etc/hosts"] = Entry.file(b"127.0.0.1 localhost armhost\n10.0.2.2 outside\n")
    init = resources.files("sterna.testbed.armhost").joinpath("init.sh").read_bytes()
    tree["init"] = Entry.file(init, 0o755)
    return tree


def kernel(package: Path) -> tuple[bytes, Tree]:
    """The kernel, and the files that it adds to the file system.

    :raise ImageError: When the package is not as expected.
    """
    image, modules = kernel_of(package)
    order = load_order(modules, KERNEL_MODULES)
    tree: Tree = {path: Entry.file(modules[path]) for path in order}
    tree[_MODULES_FILE] = Entry.file("".join(f"/{path}\n" for path in order).encode())
    return image, tree


def _unpack_wheel(path: Path) -> Iterator[tuple[str, Entry]]:
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            # NAME.data/ holds scripts and headers; modules are at the top in the wheels that we take.
            if not info.is_dir() and ".data/" not in info.filename:
                executable = info.filename.endswith(".so") or ".so." in info.filename
                yield (
                    f"{SITE}/{info.filename}",
                    Entry.file(archive.read(info), 0o755 if executable else 0o644),
                )
