"""Gather lists through descriptors, in compiled code and without."""

import os
import socket
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from tests.jit.plain import plain

from sterna.jit.kernel import COMPILED
from sterna.memory.vectors import vectors_of
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import gather
from sterna.migration.channels.gather import CANCELLED, IOV_MAX


@pytest.fixture(params=["compiled", "plain"])
def loops(request: pytest.FixtureRequest):
    if request.param == "plain":
        return plain(gather.write_list), plain(gather.read_list)
    if not COMPILED:
        pytest.skip("without numba nothing is compiled")
    return gather.write_list, gather.read_list


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        here.setblocking(False)
        there.setblocking(False)
        yield here, there


@pytest.fixture
def cancellation() -> Iterator[Cancellation]:
    with Cancellation() as cancellation:
        yield cancellation


def pieces(
    sizes: list[int], seed: int = 1
) -> tuple[list[bytearray], "np.ndarray[tuple[int, int], np.dtype[np.uint64]]"]:
    rng = np.random.default_rng(seed)
    data = [bytearray(rng.integers(0, 256, size, dtype=np.uint8).tobytes()) for size in sizes]
    return data, np.concatenate([vectors_of(piece) for piece in data])


# More rows than a call takes, rows of nothing, rows larger than a socket holds.
SIZES = [1, 0, 4096, 0, 3, 3 << 20, *[17, 0, 100] * IOV_MAX, 1 << 20, 0]


def test_a_long_list_arrives_in_order(loops, ends, cancellation: Cancellation) -> None:
    write_list, read_list = loops
    data, vectors = pieces(SIZES)
    whole = b"".join(data)
    room, places = pieces([5, 0, len(whole) - 1005, *[1, 0] * 500, 500], seed=2)
    progress = np.zeros(2, dtype=np.int64)
    outcome: list[tuple[int, int]] = []

    def write() -> None:
        outcome.append(write_list(ends[0].fileno(), cancellation.fileno(), vectors, 0, progress, -1))

    writer = threading.Thread(target=write)
    writer.start()
    done, row, code = read_list(ends[1].fileno(), cancellation.fileno(), places, 0, len(whole))
    writer.join()
    assert outcome == [(len(SIZES), 0)]
    assert progress[0] == len(whole)
    assert (done, row, code) == (len(whole), len(places), 0)
    assert b"".join(room) == whole


def test_the_least_is_enough(loops, ends, cancellation: Cancellation) -> None:
    _, read_list = loops
    ends[0].send(b"abcdefgh")
    room, places = pieces([3, 3, 3])
    done, row, code = read_list(ends[1].fileno(), cancellation.fileno(), places, 0, 4)
    assert (done, row, code) == (8, 2, 0)
    assert b"".join(room)[:8] == b"abcdefgh"
    assert places[2, 1] == 1, "the row is cut where it was read to"


def test_an_end_is_less_than_was_asked_for(loops, ends, cancellation: Cancellation) -> None:
    _, read_list = loops
    ends[0].send(b"ab")
    ends[0].shutdown(socket.SHUT_WR)
    _, places = pieces([3])
    assert read_list(ends[1].fileno(), cancellation.fileno(), places, 0, 3) == (2, 0, 0)


def test_errors_have_their_numbers(loops, ends, cancellation: Cancellation) -> None:
    write_list, read_list = loops
    _, places = pieces([3])
    closed = os.dup(0)
    os.close(closed)
    assert read_list(closed, cancellation.fileno(), places, 0, 3) == (0, 0, 9)
    ends[1].close()
    progress = np.zeros(2, dtype=np.int64)
    assert write_list(ends[0].fileno(), cancellation.fileno(), places, 0, progress, -1) == (0, 32)


def test_a_cancellation_ends_both_waits(loops, ends, cancellation: Cancellation) -> None:
    write_list, read_list = loops
    cancellation.set()
    _, places = pieces([8 << 20])
    assert read_list(ends[1].fileno(), cancellation.fileno(), places.copy(), 0, 3) == (0, 0, CANCELLED)
    progress = np.zeros(2, dtype=np.int64)
    row, code = write_list(ends[0].fileno(), cancellation.fileno(), places, 0, progress, -1)
    assert progress[1] > 0, "the socket holds less than all of it"
    assert progress[0] == (8 << 20) - places[0, 1]
    assert (row, code) == (0, CANCELLED)
    assert 0 < places[0, 1] < 8 << 20, "what went before the wait has been taken off"


def test_a_wait_for_room_ends(loops, ends, cancellation: Cancellation) -> None:
    write_list, _ = loops
    _, places = pieces([8 << 20])
    progress = np.zeros(2, dtype=np.int64)
    assert write_list(ends[0].fileno(), cancellation.fileno(), places, 0, progress, 10) == (0, 110)
    assert progress[0] == (8 << 20) - places[0, 1] > 0
