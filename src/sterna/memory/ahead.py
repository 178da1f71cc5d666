"""Kernels fetched before they are needed.

What has not been compiled yet is compiled in parallel. numba compiles one function at a time in a process, so there is a process
for each processor. As a program this module is one of them: it reads the names of kernels, line by line, and writes the files
that the cache is to hold.
"""

import ctypes
import fcntl
import importlib
import os
import queue
import signal
import struct
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress

from sterna.memory import kernelcache
from sterna.memory.kernel import COMPILED, Kernel, KernelError, kernels_ahead
from sterna.private import UnsafeError
from sterna.pythonprogram import module_command, own_environment

Tell = Callable[[str], None]
"""Told how far it is. What it raises ends the compiling."""

_LENGTH = struct.Struct("!Q")
_PR_SET_PDEATHSIG = 1
_LOOK_SECONDS = 0.1


def fetch_kernels(tell: Tell = lambda text: None) -> None:
    """Have all kernels at hand that the modules imported so far call, compiled unless that has been done.

    :raise KernelError: When one cannot be compiled.
    """
    if not COMPILED:
        return
    missing = [kernel for kernel in kernels_ahead() if not kernel.find()]
    if missing:
        with _alone(tell):
            # Another process may have compiled them meanwhile.
            missing = [kernel for kernel in missing if not kernel.find()]
            if missing:
                _compile(missing, tell)
        for kernel in missing:
            kernel.code(kernel.expected)


@contextmanager
def _alone(tell: Tell) -> Iterator[None]:
    """One process at a time compiles; where they cannot share a cache, each does."""
    with ExitStack() as stack:
        with suppress(OSError, UnsafeError):
            directory = stack.enter_context(kernelcache.opened())
            # Not in the kernel: whoever is told may end the wait.
            while not _locked(directory):
                tell("another process is compiling kernels: waiting for it")
                time.sleep(_LOOK_SECONDS)
        yield


def _locked(directory: int) -> bool:
    try:
        fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _compile(missing: Sequence[Kernel], tell: Tell) -> None:
    count = len(missing)
    # The longest first, so that no process has much left when the others are done.
    todo = deque(sorted(missing, key=lambda kernel: -len(kernel.function.__code__.co_code)))
    running: list[subprocess.Popen[bytes]] = []
    workers = min(count, len(os.sched_getaffinity(0)))
    tell(f"compiling kernels (once): 0 of {count}")
    with ThreadPoolExecutor(workers, thread_name_prefix="compile") as pool:
        try:
            running += [_start() for _ in range(workers)]
            done = queue.SimpleQueue[str | None]()
            threads = [pool.submit(_have_compiled, worker, todo, done.put) for worker in running]
            for thread in threads:
                thread.add_done_callback(lambda _: done.put(None))
            finished = ended = 0
            while ended < workers:
                if done.get() is None:
                    ended += 1
                else:
                    finished += 1
                    tell(f"compiling kernels (once): {finished} of {count}")
            for thread in threads:
                thread.result()
        finally:
            todo.clear()
            for worker in running:
                worker.kill()
            pool.shutdown()
            for worker in running:
                worker.communicate()


def _start() -> "subprocess.Popen[bytes]":
    command = module_command(__spec__.name, str(os.getpid()))
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=own_environment())


def _have_compiled(
    worker: "subprocess.Popen[bytes]", todo: deque[Kernel], done: Callable[[str], None]
) -> None:
    """Have kernels compiled by a process, until there are none left."""
    from sterna.memory.kernelcode import file_name

    assert worker.stdin is not None
    assert worker.stdout is not None
    while True:
        try:
            kernel = todo.popleft()
        except IndexError:
            return
        file = file_name(kernel, kernel.expected)
        try:
            worker.stdin.write(
                f"{kernel.function.__module__} {kernel.function.__qualname__} {file}\n".encode()
            )
            worker.stdin.flush()
            (size,) = _LENGTH.unpack(worker.stdout.read(_LENGTH.size))
        except (BrokenPipeError, struct.error):
            raise KernelError(
                f"{kernel.name} cannot be compiled: the process that did it has ended"
            ) from None
        if size:
            kernelcache.write(file, worker.stdout.read(size))
        done(kernel.name)


def main() -> None:
    """Compile the kernels whose modules, names and files in the cache standard input has, as long as the parent lives.

    Its argument is the parent's process number.
    """
    from sterna.memory.fingerprint import sources_changed
    from sterna.memory.kernelcode import compile_to_file, file_name

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
            data = compile_to_file(kernel, kernel.expected)
        if sources_changed():
            data = b""
        output.write(_LENGTH.pack(len(data)) + data)
        output.flush()


if __name__ == "__main__":
    main()
