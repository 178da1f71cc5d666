"""The host's kernel and initramfs, built once and kept in the user's cache (`sterna.testbed.debian.cache`)."""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import sterna.testbed.debian as debian
from sterna.testbed.armhost import bytecode, emulator, rootfs
from sterna.testbed.armhost.packages import fetch, fetch_kernel
from sterna.testbed.armhost.recipe import EPOCH, Recipe
from sterna.testbed.debian import cpio
from sterna.testbed.debian.cache import INITRAMFS, KERNEL, Cache, Image, digest_of
from sterna.testbed.debian.deb import Tree

_DOWNLOADS = "packages"
_OWN_MAKERS = ("bytecode.py", "init.sh", "recipe.py", "rootfs.py", "warmup.py")
_MAKERS = (
    *(Path(__file__).with_name(name) for name in _OWN_MAKERS),
    *(Path(debian.__file__).with_name(name) for name in ("cpio.py", "deb.py", "kernelmodules.py")),
)

OnProgress = Callable[[str], None]
"""Told what is being done now, in a few words."""


def obtain(recipe: Recipe, *, update: bool = False, progress: OnProgress = lambda _text: None) -> Image:
    """The image for a recipe, built if there is none, or if `update` asks for today's packages.

    :raise ImageError: When it cannot be built.
    """
    cache = Cache.named("sterna-armhost")
    digest = digest_of(recipe, _MAKERS)
    pointer = f"{recipe.kernel}-{digest}"
    if not update and (folder := cache.find(pointer)):
        return Image(folder)
    with cache.locked(progress):
        if not update and (folder := cache.find(pointer)):  # another process built it meanwhile
            return Image(folder)
        emulator.require_qemu()
        progress("fetching a kernel")
        kernel = fetch_kernel(recipe.kernel, cache.folder / _DOWNLOADS)
        root = _obtain_root(cache, recipe, kernel, update, progress)

        def build(draft: Path) -> None:
            progress("adding the kernel")
            _assemble(draft, kernel, root.initramfs)

        return Image(cache.store(pointer, digest, sorted([kernel.name, *root.packages]), build))


def _obtain_root(cache: Cache, recipe: Recipe, kernel: Path, update: bool, progress: OnProgress) -> Image:
    """The root file system that hosts have in common whatever their kernel. `kernel` may serve to make it."""
    digest = digest_of(recipe.python_packages, _MAKERS)
    pointer = f"root-{digest}"
    if not update and (folder := cache.find(pointer)):
        return Image(folder)
    progress("fetching packages")
    packages = fetch(recipe.python_packages, cache.folder / _DOWNLOADS)

    def build(draft: Path) -> None:
        progress("unpacking packages")
        tree = rootfs.build(packages)
        progress("compiling Python modules")
        if bytecode.same_python():
            tree |= bytecode.compiled_here(tree)
        else:
            with tempfile.TemporaryDirectory(dir=draft) as temporary:
                host = Path(temporary)
                _write_initramfs(host / "root", tree)
                _assemble(host, kernel, host / "root")
                tree |= bytecode.compiled_there(host / KERNEL, host / INITRAMFS)
        _write_initramfs(draft / INITRAMFS, tree)

    return Image(cache.store(pointer, digest, packages.names, build))


def _assemble(folder: Path, kernel: Path, root: Path) -> None:
    """An image's files: an initramfs may be several archives, one after the other."""
    image, files = rootfs.kernel(kernel)
    (folder / KERNEL).write_bytes(image)
    shutil.copyfile(root, folder / INITRAMFS)
    with (folder / INITRAMFS).open("ab") as file:
        cpio.write(file, files, EPOCH)


def _write_initramfs(path: Path, tree: Tree) -> None:
    with path.open("wb") as file:
        cpio.write(file, tree, EPOCH)
