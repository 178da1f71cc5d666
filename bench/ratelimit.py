"""How exact the bandwidth limit is: the largest error over any second, as a receiver in another process sees it.

    python bench/ratelimit.py [--seconds N] [MBIT ...]

For each limit a sender paced as a migration's source sends 4 KiB pages over TCP on loopback; the receiver notes when how much
came. The last line switches between two limits every 0.3 s and compares with what they allow.
"""

import argparse
import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection

import numpy as np

from sterna.jit.ahead import fetch_kernels
from sterna.memory.ram import RamBlock
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.transport.ratelimit import RateLimiter, cut

PAGES = 512
SWITCH_SECONDS = 0.3


def receive(listener: socket.socket, results: Connection) -> None:
    sock, _ = listener.accept()
    buffer = bytearray(4 << 20)
    times, sizes = [], []
    while got := sock.recv_into(buffer):
        times.append(time.monotonic())
        sizes.append(got)
    results.send((times, sizes))


def measure(rates: list[int], seconds: float) -> tuple[float, float]:
    """:return: the largest error over any second, and the mean rate over the mean limit"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        ours, theirs = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=receive, args=(listener, theirs))
        child.start()
        sock = socket.create_connection(listener.getsockname())
    cancellation = Cancellation()
    channel = SocketChannel(cancellation, "receiver", sock)
    block = RamBlock("pages", PAGES * 4096)
    block.data[:] = np.frombuffer(os.urandom(block.size), dtype=np.uint8)
    limiter = RateLimiter(rates[0], sleep=cancellation.sleep)
    page = np.array([[block.hva + 4096 * i, 4096] for i in range(PAGES)], dtype=np.uint64)
    started = time.monotonic()
    switches = [(started, rates[0])]
    while (now := time.monotonic()) < started + seconds:
        if len(rates) > 1 and now >= switches[-1][0] + SWITCH_SECONDS:
            switches.append((now, rates[len(switches) % len(rates)]))
            limiter.rate = switches[-1][1]
        rest = page.copy()
        while len(rest):
            piece, rest = cut(rest, limiter.piece_bytes(4096, 4 << 20))
            limiter.pace(int(piece[:, 1].sum()))
            channel.send_vectors(piece)
    channel.close()
    times, sizes = ours.recv()
    child.join()
    cancellation.close()
    total = np.concatenate(([0], np.cumsum(sizes)))
    marks = np.array([at for at, _ in switches] + [times[-1]])
    allowed = np.concatenate(([0.0], np.cumsum(np.diff(marks) * [rate for _, rate in switches])))
    starts = np.arange(started, times[-1] - 1.0, 0.01)
    got = total[np.searchsorted(times, starts + 1.0)] - total[np.searchsorted(times, starts)]
    due = np.interp(starts + 1.0, marks, allowed) - np.interp(starts, marks, allowed)
    return float(np.max(np.abs(got / due - 1))), float(total[-1] / allowed[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("mbit", type=int, nargs="*", default=[10, 100, 1000, 2500, 5000, 10000])
    arguments = parser.parse_args()
    fetch_kernels()
    for limits in [*([mbit] for mbit in arguments.mbit), [100, 1000]]:
        worst, mean = measure([mbit * 1_000_000 // 8 for mbit in limits], arguments.seconds)
        name = " and ".join(f"{mbit}" for mbit in limits)
        print(f"{name:>12} Mbit/s: at most {worst:6.2%} off over any second, {mean - 1:+.2%} in all")


if __name__ == "__main__":
    main()
