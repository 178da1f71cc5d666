"""The raw ceiling: how fast two processes on this host pass RAM through sockets when they do nothing else.

The memory is what guest RAM is made of (`RamBlock`): the sender's full, the receiver's given by the host in advance, as in
the migrations it is compared with. Each channel is one TCP connection over loopback, with a `sendall` of its share of the
memory at one end and `recv_into` to where it belongs at the other. The time is from the first byte to the answer that the
last has arrived.

This module is also what the two processes run: ``python -m sterna.bench.ceiling send|receive BYTES FD...``
"""

import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from itertools import pairwise

import numpy as np

from sterna.bench.errors import BenchError
from sterna.bench.migration import Measurement, RunOutcome
from sterna.host.load import HostWatch
from sterna.host.pythonprogram import module_command, own_environment
from sterna.launch.process import die_with_parent
from sterna.memory.ram import RamBlock

_POLL_SECONDS = 0.1
_SECONDS = 300.0
_DONE = b"\1"


def measure_ceiling(size: int, channels: int, check: Callable[[], None]) -> Measurement:
    """Move `size` bytes once.

    :param check: called now and then; may raise
    :raise BenchError: When a process cannot be started, or ends before it is done.
    """
    watch = HostWatch()
    with ExitStack() as stack:
        ends = [_connected(stack) for _ in range(channels)]
        receiver = _start("receive", size, [there for _, there in ends], stack)
        sender = _start("send", size, [here for here, _ in ends], stack)
        for end in (end for pair in ends for end in pair):
            end.close()
        for process in (receiver, sender):
            _line(process, check)
        assert sender.stdin is not None
        sender.stdin.write(b"go\n")
        sender.stdin.flush()
        seconds, source_cpu = _line(sender, check).split()
        destination_cpu = _line(receiver, check)
    return Measurement(
        RunOutcome.COMPLETED,
        float(seconds),
        bytes=size,
        source_cpu_s=float(source_cpu),
        destination_cpu_s=float(destination_cpu),
        host=watch.load(),
    )


def _connected(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        here = stack.enter_context(socket.create_connection(listener.getsockname()))
        there = stack.enter_context(listener.accept()[0])
    for end in (here, there):
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return here, there


def _start(role: str, size: int, ends: list[socket.socket], stack: ExitStack) -> "subprocess.Popen[bytes]":
    fds = [end.fileno() for end in ends]
    try:
        process = subprocess.Popen(
            module_command(__name__, role, str(size), *map(str, fds)),
            env=own_environment(),
            pass_fds=fds,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
            preexec_fn=die_with_parent,
        )
    except OSError as error:
        raise BenchError(f"the raw ceiling: no process can be started: {error.strerror}") from error
    stack.callback(_end, process)
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()


def _line(process: "subprocess.Popen[bytes]", check: Callable[[], None]) -> str:
    assert process.stdout is not None
    deadline = time.monotonic() + _SECONDS
    check()  # also where the answer is there already
    while not select.select([process.stdout], [], [], _POLL_SECONDS)[0]:
        check()
        if time.monotonic() > deadline:
            raise BenchError(f"the raw ceiling: no answer in {_SECONDS:g} s")
    line = process.stdout.readline().decode()
    if not line:
        raise BenchError(f"the raw ceiling: a process ended with exit code {process.wait()}")
    return line


# -- in the two processes ------------------------------------------------------------------------------------


def _receive(end: socket.socket, share: "memoryview[int]") -> None:
    at = 0
    while at < len(share):
        got = end.recv_into(share[at:])
        if not got:
            os._exit(1)
        at += got
    end.sendall(_DONE)


def _send(end: socket.socket, share: "memoryview[int]") -> None:
    end.sendall(share)
    if end.recv(1) != _DONE:
        os._exit(1)


def _in_parallel(
    work: Callable[[socket.socket, "memoryview[int]"], None], ends: list[socket.socket], block: RamBlock
) -> None:
    cuts = [block.size * i // len(ends) for i in range(len(ends) + 1)]
    parts = [(end, block.view[first:last]) for end, (first, last) in zip(ends, pairwise(cuts), strict=True)]
    threads = [threading.Thread(target=work, args=part) for part in parts[1:]]
    for thread in threads:
        thread.start()
    work(*parts[0])
    for thread in threads:
        thread.join()


def _main(role: str, size: int, fds: list[int]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends = [socket.socket(fileno=fd) for fd in fds]
    block = RamBlock("ceiling", size, populated=True)
    if role == "send":
        words = block.data.view(np.uint64)
        words[:] = np.arange(words.size, dtype=np.uint64)
    print("ready", flush=True)
    cpu = time.process_time()
    if role == "receive":
        _in_parallel(_receive, ends, block)
        print(time.process_time() - cpu, flush=True)
        return
    sys.stdin.readline()
    cpu, started = time.process_time(), time.perf_counter()
    _in_parallel(_send, ends, block)
    print(time.perf_counter() - started, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), [int(text) for text in sys.argv[3:]])
