"""Pacing, on a clock that only moves when somebody sleeps or sends."""

import socket

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.memory.vectors import vectors_of
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.transport.ratelimit import RateLimiter, cut
from sterna.migration.transport.records import send_paced

MBIT = 1_000_000 // 8


class Clock:
    """Time that passes by sleeping, and a little by working."""

    def __init__(self, oversleep: float = 0.0) -> None:
        self.now = 100.0
        self.oversleep = oversleep

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + self.oversleep


def send_for(
    limiter: RateLimiter, clock: Clock, seconds: float, work: float = 0.0
) -> list[tuple[float, int]]:
    """Send as fast as the limiter lets; return when how much was sent."""
    sent = []
    end = clock.now + seconds
    while clock.now < end:
        size = limiter.piece_bytes(4096, 4 << 20)
        limiter.pace(size)
        sent.append((clock.now, size))
        clock.now += work
    return sent


def worst_deviation(sent: list[tuple[float, int]], rate: int) -> float:
    """The largest relative error of the bytes sent in any window of one second."""
    worst, first, total = 0.0, 0, 0
    for last, (at, size) in enumerate(sent):
        total += size
        while sent[first][0] <= at - 1.0:
            total -= sent[first][1]
            first += 1
        if first > 0 and last:
            worst = max(worst, abs(total - rate) / rate)
    return worst


@given(
    megabits=st.integers(10, 10_000),
    oversleep=st.floats(0, 0.002),
    work_share=st.floats(0, 0.5),
)
def test_any_second_is_within_five_percent(megabits: int, oversleep: float, work_share: float) -> None:
    rate = megabits * MBIT
    clock = Clock(oversleep)
    limiter = RateLimiter(rate, clock=clock, sleep=clock.sleep)
    piece = limiter.piece_bytes(4096, 4 << 20)
    sent = send_for(limiter, clock, 2.5, work=piece / rate * work_share)
    assert worst_deviation(sent, rate) < 0.05


def test_a_sender_that_was_held_up_does_not_burst() -> None:
    clock = Clock()
    limiter = RateLimiter(1000 * MBIT, clock=clock, sleep=clock.sleep)
    send_for(limiter, clock, 0.5)
    clock.now += 5.0
    sent = send_for(limiter, clock, 1.0)
    assert sum(size for _, size in sent) <= 1000 * MBIT * 1.05


def test_zero_is_unlimited_and_a_new_rate_takes_effect() -> None:
    clock = Clock()
    limiter = RateLimiter(0, clock=clock, sleep=clock.sleep)
    for _ in range(1000):
        limiter.pace(1 << 30)
    assert clock.now == 100.0
    limiter.rate = 100 * MBIT
    sent = send_for(limiter, clock, 2.0)
    assert sum(size for _, size in sent) == pytest.approx(200 * MBIT, rel=0.05)


def test_what_the_sleep_raises_ends_the_wait() -> None:
    class Stop(Exception):
        pass

    def sleep(seconds: float) -> None:
        raise Stop

    clock = Clock()
    limiter = RateLimiter(MBIT, clock=clock, sleep=sleep)
    limiter.pace(MBIT)
    with pytest.raises(Stop):
        limiter.pace(1)


@given(
    rates=st.lists(st.integers(10, 10_000), min_size=2, max_size=5),
    oversleep=st.floats(0, 0.002),
    often=st.floats(0.05, 0.4),
)
def test_any_second_is_within_five_percent_of_the_limits_it_had(
    rates: list[int], oversleep: float, often: float
) -> None:
    clock = Clock(oversleep)
    limiter = RateLimiter(rates[0] * MBIT, clock=clock, sleep=clock.sleep)
    sent: list[tuple[float, int]] = []
    switches: list[tuple[float, int]] = []
    for rate in rates * 3:
        limiter.rate = rate * MBIT
        switches.append((clock.now, rate * MBIT))
        sent += send_for(limiter, clock, often)
    times = np.array([at for at, _ in sent])
    total = np.concatenate(([0], np.cumsum([size for _, size in sent])))

    def allowed(start: float, end: float) -> float:
        ends = [*(at for at, _ in switches[1:]), clock.now]
        return sum(
            rate * max(0.0, min(end, until) - max(start, since))
            for (since, rate), until in zip(switches, ends, strict=True)
        )

    for start in np.linspace(100.0, clock.now - 1.0, 20) if clock.now > 101.0 else ():
        first, last = np.searchsorted(times, [start, start + 1.0], side="right")
        # A sender held up at one limit may catch up at the next, higher one.
        slack = 0.05 * max(allowed(start, start + 1.0), max(rates) * MBIT)
        assert abs(int(total[last] - total[first]) - allowed(start, start + 1.0)) <= slack


def test_a_higher_limit_ends_a_long_wait_early() -> None:
    clock = Clock()
    limiter = RateLimiter(1000, clock=clock, sleep=clock.sleep)
    limiter.pace(100_000)

    def raise_limit(seconds: float) -> None:
        clock.sleep(seconds)
        limiter.rate = 1_000_000

    limiter._sleep = raise_limit
    limiter.pace(1)
    assert clock.now == pytest.approx(100.15, abs=0.01)


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=8), st.integers(1, 30_000))
def test_a_gather_list_is_cut_after_so_many_bytes(lengths: list[int], size: int) -> None:
    def addresses(vectors: "np.ndarray[tuple[int, int], np.dtype[np.uint64]]") -> list[int]:
        return [at for start, length in vectors.tolist() for at in range(start, start + length)]

    vectors = np.array([[row * 10_000, length] for row, length in enumerate(lengths)], dtype=np.uint64)
    before = vectors.copy()
    head, rest = cut(vectors, size)
    assert addresses(head) + addresses(rest) == addresses(before)
    assert int(head[:, 1].sum()) == min(size, sum(lengths))
    assert (head[:, 1] > 0).all()
    assert (rest[:, 1] > 0).all()


@pytest.mark.parametrize(("rate", "final"), [(1000, True), (0, False)])
def test_nothing_is_paced_while_the_guest_waits_or_without_a_limit(rate: int, final: bool) -> None:
    def sleep(seconds: float) -> None:
        raise AssertionError("paced")

    data = bytes(range(256)) * 16
    here, there = socket.socketpair()
    with there, Cancellation() as cancellation, SocketChannel(cancellation, "peer", here) as channel:
        limiter = RateLimiter(rate, sleep=sleep)
        vectors = np.concatenate([vectors_of(data), vectors_of(data)])
        assert send_paced(channel, vectors, limiter, final=final) == 2 * len(data)
        assert there.recv(3 * len(data)) == 2 * data
