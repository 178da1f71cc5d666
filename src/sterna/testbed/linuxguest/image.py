"""Kernel, initramfs and root file system of the guest, built once and kept in the user's cache.

The same packages and the same ssh keys make the same bytes.
"""

import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import sterna.testbed.debian as debian
from sterna.guests.catalog import LINUX, LINUX_PROGRAMS, find
from sterna.testbed.debian import cpio
from sterna.testbed.debian.apt import Apt
from sterna.testbed.debian.cache import INITRAMFS, KERNEL, Cache, Image, digest_of
from sterna.testbed.debian.cpio import Entry
from sterna.testbed.debian.deb import Tree, kernel_of, system_files, unpack
from sterna.testbed.debian.kernelmodules import load_order
from sterna.testbed.errors import ImageError
from sterna.testbed.linuxguest.ext4 import make_ext4
from sterna.testbed.linuxguest.keys import CLIENT, HOST, Keys
from sterna.testbed.linuxguest.recipe import (
    ARCHITECTURE,
    DEBIAN_PACKAGES,
    DISK_BYTES,
    EPOCH,
    FILES,
    KERNEL_MODULES,
    KERNEL_PACKAGE,
    LEFT_OUT,
)

ROOT = "root.ext4"
_BUSYBOX = "usr/bin/busybox"
_APPLETS = (
    *(
        "cat",
        "chmod",
        "date",
        "dmesg",
        "echo",
        "fallocate",
        "hostname",
        "ifconfig",
        "ip",
        "ls",
        "mkdir",
        "mkswap",
    ),
    *("mount", "ping", "ps", "sh", "sleep", "swapon", "tr", "uptime"),
)


@dataclass(frozen=True)
class LinuxImage(Image):
    """A built guest, whose initramfs mounts the root file system.

    :ivar keys: of ssh
    """

    keys: Keys

    @property
    def root(self) -> Path:
        """The root file system; guests write to copies of it."""
        return self.folder / ROOT


def obtain(progress: Callable[[str], None] = lambda text: None) -> LinuxImage:
    """The image, built if there is none of this recipe yet.

    :raise ImageError: When it cannot be built.
    """
    cache = Cache.named("sterna-linux")
    keys = Keys(cache.folder / "keys")
    digest = digest_of(DISK_BYTES, _makers())
    pointer = f"{ARCHITECTURE}-{digest}"
    if folder := cache.find(pointer):
        return LinuxImage(folder, keys)
    with cache.locked(progress):
        if folder := cache.find(pointer):  # another process built it meanwhile
            return LinuxImage(folder, keys)
        progress("fetching the guest's packages (once)")
        apt = Apt(cache.folder / "packages", ARCHITECTURE)
        kernel = apt.kernel(KERNEL_PACKAGE)
        debs = apt.packages(DEBIAN_PACKAGES)
        keys.make()
        progress("building the guest's images (once)")
        names = sorted(path.name for path in (kernel, *debs))
        folder = cache.store(
            pointer,
            digest,
            [*names, keys.public(HOST)],
            lambda draft: build(draft, kernel, debs, keys),
        )
        return LinuxImage(folder, keys)


def build(draft: Path, kernel: Path, debs: tuple[Path, ...], keys: Keys) -> None:
    """Make the files of an image in an empty folder.

    :param kernel: the kernel's package
    :param debs: the other packages
    :raise ImageError: When a package is not as expected, or a tool is missing.
    """
    files: Tree = {}
    for deb in debs:
        found = {path: entry for path, entry in unpack(deb) if path.startswith(FILES)}
        files |= {path: entry for path, entry in found.items() if not path.startswith(LEFT_OUT)}
    if missing := [name for name in FILES if not name.endswith("/") and name not in files]:
        raise ImageError(f"{missing[0]} is in none of the packages {', '.join(path.name for path in debs)}")
    image, modules = kernel_of(kernel)
    (draft / KERNEL).write_bytes(image)
    with (draft / INITRAMFS).open("wb") as file:
        cpio.write(file, _initramfs(files[_BUSYBOX], modules), EPOCH)
    make_ext4(draft / ROOT, _root(files, keys), DISK_BYTES, EPOCH)


def _initramfs(busybox: Entry, modules: Mapping[str, bytes]) -> Tree:
    order = load_order(modules, KERNEL_MODULES)
    tree: Tree = {path: Entry.file(modules[path]) for path in order}
    tree["bin/busybox"] = busybox
    tree["modules"] = Entry.file("".join(f"/{path}\n" for path in order).encode())
    tree["init"] = Entry.file(_own("init.sh"), 0o755)
    return tree


def _root(files: Tree, keys: Keys) -> Tree:
    tree = files | system_files("var/log")
    tree["root"] = tree["root/.ssh"] = Entry(stat.S_IFDIR | 0o700)
    tree |= {f"usr/bin/{name}": Entry.link("busybox") for name in _APPLETS}
    for program in LINUX_PROGRAMS:
        tree[f"usr/bin/sterna/{program}"] = Entry.file(find(program, LINUX).read_bytes(), 0o755)
    tree["usr/sbin/sterna-init"] = Entry.file(_own("root.sh"), 0o755)
    tree["etc/dropbear/host_key"] = Entry.file(keys.host_for_dropbear(), 0o600)
    tree["root/.ssh/authorized_keys"] = Entry.file(f"{keys.public(CLIENT)}\n".encode(), 0o600)
    return tree


def _own(name: str) -> bytes:
    return resources.files("sterna.testbed.linuxguest").joinpath(name).read_bytes()


def _makers() -> list[Path]:
    """What an image is made by, the programs in it included."""
    own = ("ext4.py", "image.py", "init.sh", "keys.py", "recipe.py", "root.sh")
    common = ("cpio.py", "deb.py", "kernelmodules.py")
    return [
        *(Path(__file__).with_name(name) for name in own),
        *(Path(debian.__file__).with_name(name) for name in common),
        *(find(program, LINUX) for program in LINUX_PROGRAMS),
    ]
