"""Whether this program's kernels have been compiled before, and what to say when they have not."""

import importlib.metadata
import platform
import sys
from collections.abc import Callable

from sterna.memory.kernel import COMPILED
from sterna.memory.kernelcache import kernel_directory

COMPILING = "compiling kernels (once)"


class Stamp:
    """A mark beside the compiled kernels, for this state of the sources, this Python and this numba.

    :param name: what has been done
    """

    def __init__(self, name: str) -> None:
        try:
            version = importlib.metadata.version("numba")
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        self._path = (
            kernel_directory()
            / f"{name}-{platform.python_implementation()}-{platform.python_version()}-{version}"
        )

    def exists(self) -> bool:
        """Whether it has been done."""
        return self._path.exists()

    def set(self) -> None:
        """It has been done."""
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.touch()
        except OSError:
            pass  # it will be done again


def prepare_kernels() -> None:
    """Have the kernels of a migration at hand before a guest needs them; say so when that takes a while."""
    from sterna.memory.bitmap import new_bitmap, page_numbers
    from sterna.memory.shadow import warm_up as warm_up_shadow
    from sterna.migration.channels import gather
    from sterna.migration.multifd import warmup as multifd
    from sterna.migration.xbzrlecache import warm_up as warm_up_xbzrle
    from sterna.stream.ram import warm_up as warm_up_records

    def warm_up() -> None:
        page_numbers(new_bitmap(1))
        gather.warm_up()
        warm_up_records()
        warm_up_xbzrle()
        multifd.warm_up()
        warm_up_shadow()

    _prepare("warmed-up", warm_up)


def prepare_survey_kernels() -> None:
    """The same for those that look at a live stream."""
    from sterna.stream.ram_survey import warm_up

    _prepare("survey-warmed-up", warm_up)


def _prepare(name: str, warm_up: Callable[[], None]) -> None:
    stamp = Stamp(name)
    if stamp.exists() or not COMPILED:
        warm_up()
        return
    print(f"sterna: {COMPILING}", file=sys.stderr, flush=True)
    warm_up()
    stamp.set()
