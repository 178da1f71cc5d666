"""The host's kernel and initramfs, built once and kept in the user's cache.

An image's folder is named by a digest of the versions of all packages in it, and of what puts them together; `manifest.json`
lists them. Once there is an image for a recipe, nothing is asked of the network until an update is asked for.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sterna.testbed.armhost import bytecode, cpio, emulator, rootfs
from sterna.testbed.armhost.errors import ArmHostError
from sterna.testbed.armhost.packages import fetch
from sterna.testbed.armhost.recipe import EPOCH, Recipe

_KERNEL, _INITRAMFS, _MANIFEST = "kernel", "initramfs", "manifest.json"
_KEPT = 3
_MAKERS = ("bytecode.py", "cpio.py", "init.sh", "kernelmodules.py", "recipe.py", "rootfs.py", "warmup.py")

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
        return list(json.loads((self.folder / _MANIFEST).read_text())["packages"])


def cache_folder() -> Path:
    """Where images and downloads are kept: below XDG_CACHE_HOME."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "sterna-armhost"


def obtain(recipe: Recipe, *, update: bool = False, progress: Progress = lambda _text: None) -> Image:
    """The image for a recipe, built if there is none, or if `update` asks for today's packages.

    :raise ArmHostError: When it cannot be built.
    """
    cache = cache_folder()
    pointer = cache / f"{recipe.kernel}-{_recipe_digest(recipe)}"
    if not update and (image := _pointed_to(pointer)):
        return image
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArmHostError(f"cannot write to {cache}: {error.strerror}; set XDG_CACHE_HOME") from error
    with _lock(cache / "lock"):
        if not update and (image := _pointed_to(pointer)):  # another process built it meanwhile
            return image
        emulator.require_qemu()
        progress("fetching packages")
        packages = fetch(recipe, cache / "packages")
        key = hashlib.sha256("\n".join([_recipe_digest(recipe), *packages.names]).encode()).hexdigest()[:16]
        folder = cache / key
        if not (folder / _MANIFEST).exists():
            progress("unpacking packages")
            kernel, tree = rootfs.build(packages)
            _store(folder, kernel, tree, packages.names, progress)
        _replace(pointer, key.encode())
        _prune(cache)
        return Image(folder)


def _recipe_digest(recipe: Recipe) -> str:
    """Changes with the recipe and with what an image is made by."""
    digest = hashlib.sha256(repr(recipe).encode())
    for name in _MAKERS:
        digest.update(name.encode() + b"\0" + Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def _pointed_to(pointer: Path) -> Image | None:
    try:
        folder = pointer.parent / pointer.read_text()
    except FileNotFoundError:
        return None
    if not (folder / _MANIFEST).exists():
        return None
    os.utime(folder)
    return Image(folder)


def _store(folder: Path, kernel: bytes, tree: rootfs.Tree, names: list[str], progress: Progress) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        draft = Path(temporary) / "image"
        draft.mkdir()
        (draft / _KERNEL).write_bytes(kernel)
        _write_initramfs(draft / _INITRAMFS, tree)
        progress("compiling Python modules")
        tree |= bytecode.compiled(tree, draft / _KERNEL, draft / _INITRAMFS)
        _write_initramfs(draft / _INITRAMFS, tree)
        (draft / _MANIFEST).write_text(json.dumps({"packages": names}, indent=1) + "\n")
        draft.rename(folder)


def _write_initramfs(path: Path, tree: rootfs.Tree) -> None:
    with path.open("wb") as file:
        cpio.write(file, tree, EPOCH)


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _replace(path: Path, content: bytes) -> None:
    draft = path.with_suffix(".new")
    draft.write_bytes(content)
    draft.rename(path)


def _prune(cache: Path) -> None:
    """Forget all images but the ones used last."""
    images = sorted(cache.glob(f"*/{_MANIFEST}"), key=lambda path: path.parent.stat().st_mtime, reverse=True)
    for manifest in images[_KEPT:]:
        shutil.rmtree(manifest.parent, ignore_errors=True)
