"""For which share of their time a throttle holds the vCPUs, on a clock that goes only while it waits."""

import threading

import pytest
from tests.refusal import refuse_threads

from sterna.machine.throttle import Throttle

SLICE_S = 0.01
TIMEOUT = 30


class Clock(threading.Condition):
    """What the throttle waits on: a wait takes its whole time at once. After `rounds` waits it stands, until told to go on."""

    def __init__(self, rounds: int) -> None:
        super().__init__()
        self.now = 0.0
        self._left = rounds
        self._allowed = threading.Event()
        self.reached = threading.Event()

    def wait(self, timeout: float | None = None) -> bool:
        assert timeout is not None
        assert timeout > 0
        if self._left == 0:
            self.reached.set()
            return super().wait(TIMEOUT)
        self._left -= 1
        self.now += timeout
        return False

    def go_on(self, rounds: int) -> None:
        """So many waits more."""
        with self:
            self.reached.clear()
            self._left = rounds
            self.notify_all()


class Vcpus:
    """Which are held, and from when to when."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.held_since: float | None = None
        self.holds: list[tuple[float, float]] = []

    def hold(self) -> None:
        assert self.held_since is None
        self.held_since = self._clock.now

    def release(self) -> None:
        assert self.held_since is not None
        self.holds.append((self.held_since, self._clock.now))
        self.held_since = None


@pytest.mark.parametrize("percent", [1, 20, 50, 75, 99])
def test_vcpus_stand_still_for_their_share_of_the_time(percent: int) -> None:
    """They run for a slice, then stand for so long that the share is the percentage, in each round as in all."""
    clock = Clock(rounds=20)
    vcpus = Vcpus(clock)
    throttle = Throttle(vcpus, clock)
    throttle.set(percent)
    assert clock.reached.wait(TIMEOUT)
    throttle.set(0)
    assert len(vcpus.holds) == 10
    assert vcpus.held_since is None
    released = 0.0
    for since, until in vcpus.holds:
        assert since - released == pytest.approx(SLICE_S)
        assert (until - since) / (until - released) == pytest.approx(percent / 100)
        released = until
    held = sum(until - since for since, until in vcpus.holds)
    assert held / clock.now == pytest.approx(percent / 100)


def test_another_percentage_holds_from_the_next_round_on() -> None:
    clock = Clock(rounds=4)
    vcpus = Vcpus(clock)
    throttle = Throttle(vcpus, clock)
    throttle.set(50)
    assert clock.reached.wait(TIMEOUT)
    clock.reached.clear()
    throttle.set(80)  # ends the wait that the clock stands in
    assert clock.reached.wait(TIMEOUT)
    clock.go_on(4)
    assert clock.reached.wait(TIMEOUT)
    throttle.set(0)
    lengths = [until - since for since, until in vcpus.holds]
    assert lengths[:2] == pytest.approx([SLICE_S, SLICE_S])
    assert lengths[-1] == pytest.approx(4 * SLICE_S)
    assert vcpus.held_since is None


@pytest.mark.parametrize("rounds", [4, 5])
def test_without_a_throttle_no_vcpu_is_held(rounds: int) -> None:
    """Whether it is ended while they run or while they stand; and it can be put on again."""
    clock = Clock(rounds)
    vcpus = Vcpus(clock)
    throttle = Throttle(vcpus, clock)
    throttle.set(0)
    assert clock.now == 0
    for _ in range(2):
        throttle.set(60)
        assert clock.reached.wait(TIMEOUT)
        assert (vcpus.held_since is not None) is (rounds % 2 == 1)
        throttle.set(0)
        assert vcpus.held_since is None
        assert not any(thread.name == "throttle" for thread in threading.enumerate())
        now = clock.now
        clock.go_on(rounds)
        assert clock.now == now, "nothing goes on"


def test_a_throttle_that_cannot_begin_can_be_ended_and_put_on_again(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse_threads(monkeypatch, "throttle", times=1)
    clock = Clock(rounds=4)
    vcpus = Vcpus(clock)
    throttle = Throttle(vcpus, clock)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        throttle.set(50)
    throttle.set(0)
    throttle.set(20)
    assert clock.reached.wait(TIMEOUT)
    assert vcpus.held_since is None
    assert len(vcpus.holds) == 2
    throttle.set(0)
