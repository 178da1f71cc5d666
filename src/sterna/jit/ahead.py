"""Kernels fetched before they are needed.

What has not been compiled yet is compiled in parallel. numba compiles one function at a time in a process, so there is a process
for each processor that this one may use, as far as memory goes. As a program this module is one of them: it reads the names of
kernels, line by line, and writes the files that the cache is to hold.
"""

import ctypes
import importlib
import os
import selectors
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress

from sterna.host.filelock import lock
from sterna.host.limits import available_bytes, usable_cpus
from sterna.host.private import UnsafeError
from sterna.host.pythonprogram import module_command, own_environment
from sterna.jit import kernelcache
from sterna.jit.kernel import COMPILED, Kernel, KernelError, NoCompilerError, kernels_ahead

Tell = Callable[[str], None]
"""Told how far it is. What it raises ends the compiling."""
Check = Callable[[], None]
"""Called every tenth of a second, as one kernel may take many seconds. What it raises ends the compiling."""

_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_CHECK_SECONDS = 0.1
_COMPILER_BYTES = 300 << 20
"""Memory that is left to each process; it takes some 200 MiB."""


def fetch_kernels(tell: Tell = lambda text: None, check: Check = lambda: None) -> None:
    """Have all kernels at hand that the modules imported so far call, compiled unless that has been done.

    :raise KernelError: When one cannot be compiled.
    """
    if not COMPILED:
        return
    missing = [kernel for kernel in kernels_ahead() if not kernel.find()]
    if missing:
        with _alone(tell, check):
            # Another process may have compiled them meanwhile.
            missing = [kernel for kernel in missing if not kernel.find()]
            if missing:
                _compile(missing, tell, check)
        for kernel in missing:
            kernel.code(kernel.expected)


@contextmanager
def _alone(tell: Tell, check: Check) -> Iterator[None]:
    """One process at a time compiles; where they cannot share a cache, each does."""

    def wait() -> None:
        check()
        tell("another process is compiling kernels: waiting for it")

    with ExitStack() as stack:
        with suppress(OSError, UnsafeError):
            directory = stack.enter_context(kernelcache.opened())
            lock(directory, check=wait)
        yield


class _Compiler:
    """A process that compiles kernels, one after the other. A context manager: it is gone at its end.

    :raise OSError: When it cannot be started.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            module_command(__spec__.name, str(os.getpid())),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=own_environment(),
        )
        self._name = self._file = ""

    def fileno(self) -> int:
        """A descriptor that polls as readable when a kernel is compiled, or the process has ended."""
        assert self._process.stdout is not None
        return self._process.stdout.fileno()

    def begin(self, kernel: Kernel) -> None:
        """Have a kernel compiled."""
        from sterna.jit.code import file_name

        assert self._process.stdin is not None
        self._name, self._file = kernel.name, file_name(kernel, kernel.expected)
        request = f"{kernel.function.__module__} {kernel.function.__qualname__} {self._file}\n"
        with suppress(BrokenPipeError):  # then there is no answer, either
            self._process.stdin.write(request.encode())
            self._process.stdin.flush()

    def finish(self) -> None:
        """Keep what it has compiled.

        :raise KernelError: When the process has ended instead.
        """
        if size := _LENGTH.unpack(self._read(_LENGTH.size))[0]:
            kernelcache.write(self._file, self._read(size))

    def _read(self, size: int) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(size)
        if len(data) < size:
            raise KernelError(f"{self._name} cannot be compiled: the process that did it has ended")
        return data

    def __enter__(self) -> "_Compiler":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._process.kill()
        self._process.communicate()


def _compile(missing: Sequence[Kernel], tell: Tell, check: Check) -> None:
    count = len(missing)
    # The longest first, so that no process has much left when the others are done.
    todo = deque(sorted(missing, key=lambda kernel: -len(kernel.function.__code__.co_code)))
    finished = 0
    tell(f"compiling kernels (once): 0 of {count}")
    with ExitStack() as stack:
        busy = stack.enter_context(selectors.DefaultSelector())
        for compiler in _start(min(count, _places()), stack):
            compiler.begin(todo.popleft())
            busy.register(compiler, selectors.EVENT_READ, compiler)
        while busy.get_map():
            check()
            for key, _ in busy.select(_CHECK_SECONDS):
                compiler = key.data
                compiler.finish()
                finished += 1
                tell(f"compiling kernels (once): {finished} of {count}")
                if todo:
                    compiler.begin(todo.popleft())
                else:
                    busy.unregister(compiler)


def _places() -> int:
    """How many processes can compile at once."""
    memory = available_bytes()
    return max(1, usable_cpus() if memory is None else min(usable_cpus(), memory // _COMPILER_BYTES))


def _start(count: int, stack: ExitStack) -> list[_Compiler]:
    """As many processes as there may be, up to `count`.

    :raise KernelError: When there may be none.
    """
    started: list[_Compiler] = []
    for _ in range(count):
        try:
            started.append(stack.enter_context(_Compiler()))
        except OSError as error:
            if not started:
                raise KernelError(
                    f"kernels cannot be compiled: no process can be started: {error.strerror}"
                ) from error
            break
    return started


def main() -> None:
    """Compile the kernels whose modules, names and files in the cache standard input has, as long as the parent lives.

    Its argument is the parent's process number.
    """
    from sterna.jit.code import compile_to_file, file_name
    from sterna.jit.fingerprint import sources_changed

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(1)
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    for line in sys.stdin:
        module, name, file = line.split()
        kernel = getattr(importlib.import_module(module), name)
        # What the parent has loaded may have changed since; then it compiles for itself.
        data = b""
        if file_name(kernel, kernel.expected) == file:
            with suppress(NoCompilerError):  # the parent meets it too, and says so
                data = compile_to_file(kernel, kernel.expected)
        if sources_changed():
            data = b""
        output.write(_LENGTH.pack(len(data)) + data)
        output.flush()


if __name__ == "__main__":
    main()
