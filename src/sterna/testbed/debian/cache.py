"""Images that were built once, kept in the user's cache.

An image's folder is named by a digest of its recipe and of the packages in it. A pointer, named by the recipe, names the
folder: once there is one, nothing is asked of the network.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sterna.host.filelock import lock
from sterna.testbed.errors import ImageError

KERNEL, INITRAMFS, MANIFEST = "kernel", "initramfs", "manifest.json"
_KEPT = 4


def digest_of(recipe: object, makers: Iterable[Path]) -> str:
    """Changes with a recipe and with the files that an image is made by."""
    digest = hashlib.sha256(repr(recipe).encode())
    for path in makers:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Image:
    """A built image.

    :ivar folder: holds the kernel, the initramfs and the manifest
    """

    folder: Path

    @property
    def kernel(self) -> Path:
        """The kernel, as QEMU loads it."""
        return self.folder / KERNEL

    @property
    def initramfs(self) -> Path:
        """What the kernel starts with."""
        return self.folder / INITRAMFS

    @property
    def packages(self) -> list[str]:
        """File names of the packages in it."""
        return list(json.loads((self.folder / MANIFEST).read_text())["packages"])


@dataclass(frozen=True)
class Cache:
    """A folder of images.

    :ivar folder: below XDG_CACHE_HOME
    """

    folder: Path

    @classmethod
    def named(cls, name: str) -> "Cache":
        """The user's, of that name."""
        return cls(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / name)

    def find(self, pointer: str) -> Path | None:
        """The folder of the image that is pointed to; None: it was not built yet."""
        try:
            folder = self.folder / (self.folder / pointer).read_text()
        except FileNotFoundError:
            return None
        if not (folder / MANIFEST).exists():
            return None
        os.utime(folder)
        return folder

    @contextlib.contextmanager
    def locked(self, progress: Callable[[str], None]) -> Iterator[None]:
        """One process at a time builds.

        :param progress: told when another does
        :raise ImageError: When the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            file = (self.folder / "lock").open("w")
        except OSError as error:
            raise ImageError(
                f"cannot write to {self.folder}: {error.strerror}; set XDG_CACHE_HOME"
            ) from error
        with file:
            lock(
                file.fileno(),
                waiting=lambda: progress(f"another process builds images in {self.folder}: waiting for it"),
            )
            yield

    def store(
        self, pointer: str, recipe: str, packages: Sequence[str], build: Callable[[Path], None]
    ) -> Path:
        """The folder of an image, built unless it is there; pointed to from now on. Call it `locked`.

        :param recipe: its digest
        :param packages: names of what is in it, with versions
        :param build: fills an empty folder
        """
        key = hashlib.sha256("\n".join([recipe, *packages]).encode()).hexdigest()[:16]
        folder = self.folder / key
        if not (folder / MANIFEST).exists():
            try:
                with tempfile.TemporaryDirectory(dir=self.folder) as temporary:
                    draft = Path(temporary) / "image"
                    draft.mkdir()
                    build(draft)
                    (draft / MANIFEST).write_text(json.dumps({"packages": list(packages)}, indent=1) + "\n")
                    draft.rename(folder)
            except OSError as error:
                raise ImageError(f"cannot write an image to {self.folder}: {error.strerror}") from error
        os.utime(folder)
        draft = self.folder / f"{pointer}.new"
        draft.write_text(key)
        draft.rename(self.folder / pointer)
        self._prune()
        return folder

    def _prune(self) -> None:
        """Forget all images but the ones used last."""
        images = sorted(
            self.folder.glob(f"*/{MANIFEST}"), key=lambda path: path.parent.stat().st_mtime, reverse=True
        )
        for manifest in images[_KEPT:]:
            shutil.rmtree(manifest.parent, ignore_errors=True)
