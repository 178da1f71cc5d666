"""The host's kernel and initramfs, built once and kept in the user's cache (`sterna.testbed.debian.cache`)."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import sterna.testbed.debian as debian
from sterna.testbed.armhost import bytecode, emulator, rootfs
from sterna.testbed.armhost.packages import fetch
from sterna.testbed.armhost.recipe import EPOCH, Recipe
from sterna.testbed.debian import cpio
from sterna.testbed.debian.cache import Cache, digest_of, packages_of
from sterna.testbed.debian.deb import Tree

_KERNEL, _INITRAMFS = "kernel", "initramfs"
_OWN_MAKERS = ("bytecode.py", "init.sh", "recipe.py", "rootfs.py", "warmup.py")
_MAKERS = (
    *(Path(__file__).with_name(name) for name in _OWN_MAKERS),
    *(Path(debian.__file__).with_name(name) for name in ("cpio.py", "deb.py", "kernelmodules.py")),
)

Progress = Callable[[str], None]
"""Told what is being done now, in a few words."""


@dataclass(frozen=True)
class Image:
    """A built host.

    :ivar folder: holds the kernel, the initramfs and the manifest
    """

    folder: Path

    @property
    def kernel(self) -> Path:
        """The kernel, as QEMU loads it."""
        return self.folder / _KERNEL

    @property
    def initramfs(self) -> Path:
        """The root file system."""
        return self.folder / _INITRAMFS

    @property
    def packages(self) -> list[str]:
        """File names of the packages in it."""
        return packages_of(self.folder)


def obtain(recipe: Recipe, *, update: bool = False, progress: Progress = lambda _text: None) -> Image:
    """The image for a recipe, built if there is none, or if `update` asks for today's packages.

    :raise ImageError: When it cannot be built.
    """
    cache = Cache.named("sterna-armhost")
    digest = digest_of(recipe, _MAKERS)
    pointer = f"{recipe.kernel}-{digest}"
    if not update and (folder := cache.find(pointer)):
        return Image(folder)
    with cache.locked():
        if not update and (folder := cache.find(pointer)):  # another process built it meanwhile
            return Image(folder)
        emulator.require_qemu()
        progress("fetching packages")
        packages = fetch(recipe, cache.folder / "packages")

        def build(draft: Path) -> None:
            progress("unpacking packages")
            kernel, tree = rootfs.build(packages)
            (draft / _KERNEL).write_bytes(kernel)
            _write_initramfs(draft / _INITRAMFS, tree)
            progress("compiling Python modules")
            tree |= bytecode.compiled(tree, draft / _KERNEL, draft / _INITRAMFS)
            _write_initramfs(draft / _INITRAMFS, tree)

        return Image(cache.store(pointer, digest, packages.names, build))


def _write_initramfs(path: Path, tree: Tree) -> None:
    with path.open("wb") as file:
        cpio.write(file, tree, EPOCH)
