"""Compiles kernels before a guest or a stream needs them: a guest that stands still would wait for the compiler."""

import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import sterna
from sterna.cli.errors import CliError, ExitCode
from sterna.jit import kernelcache

_MIGRATION = (
    "sterna.memory.bitmap",
    "sterna.memory.shadow",
    "sterna.migration.channels.gather",
    "sterna.migration.destination.multifd.receiveloop",
    "sterna.stream.multifd.kernels",
    "sterna.stream.xbzrle.changes",
    "sterna.stream.ram.records",
)
_SURVEY = ("sterna.analysis.capture",)
"""Modules whose kernels are called, their own or those of what they import."""


def prepare_kernels(accel: str = "emulated", check: Callable[[], None] = lambda: None) -> None:
    """Have the kernels of a machine and its migrations at hand; say so when that takes a while.

    :param check: called now and then; what it raises ends it
    """
    from sterna.hypervisor.accelerator import ACCELERATORS

    _prepare((*_MIGRATION, *ACCELERATORS.get(accel).kernels), check)


def prepare_survey_kernels(check: Callable[[], None] = lambda: None) -> None:
    """The same for those that look at a stream."""
    _prepare(_SURVEY, check)


def compile_kernels(accel: str = "emulated", check: Callable[[], None] = lambda: None) -> None:
    """Compile them for the programs that this one starts. A mark in the cache says that this was done for these sources and this
    processor; the programs themselves check each kernel.
    """
    from sterna.jit.kernel import COMPILED
    from sterna.jit.source import loading

    if not COMPILED:
        return
    with _failures(), loading():
        from sterna.jit.fingerprint import target
    digest = hashlib.sha256(f"{accel} {target()}\0".encode())
    for path in sorted(Path(sterna.__file__).parent.rglob("*.py")):
        found = path.stat()
        digest.update(f"{path} {found.st_size} {found.st_mtime_ns}\0".encode())
    mark = f"compiled-{digest.hexdigest()[:24]}"
    if kernelcache.read(mark) is None:
        prepare_kernels(accel, check)
        kernelcache.write(mark, b"")


def _prepare(modules: tuple[str, ...], check: Callable[[], None]) -> None:
    from sterna.jit.ahead import fetch_kernels
    from sterna.jit.kernel import COMPILED

    if not COMPILED:
        return
    try:
        for module in modules:
            importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CliError(
            f"the Python package {error.name} is missing: pip install {error.name}", ExitCode.UNSUPPORTED
        ) from error
    except ImportError as error:
        raise CliError(f"a Python package does not load: {error}", ExitCode.UNSUPPORTED) from error
    with _failures(), _line() as tell:
        fetch_kernels(tell, check)


@contextmanager
def _failures() -> Iterator[None]:
    """A compiler that does not load in the body of the `with` statement is not supported."""
    from sterna.jit.kernel import NoCompilerError

    try:
        yield
    except NoCompilerError as error:
        raise CliError(str(error), ExitCode.UNSUPPORTED) from error


@contextmanager
def _line() -> Iterator[Callable[[str], None]]:
    """Shows how far it is, in place on a terminal; elsewhere that it has begun."""
    terminal = sys.stderr.isatty()
    shown = ""

    def tell(text: str) -> None:
        nonlocal shown
        if terminal:
            print(f"\r\x1b[Ksterna: {text}", end="", file=sys.stderr, flush=True)
        elif text.partition(":")[0] != shown.partition(":")[0]:
            print(f"sterna: {text}", file=sys.stderr, flush=True)
        shown = text

    try:
        yield tell
    finally:
        if terminal and shown:
            print(file=sys.stderr, flush=True)
