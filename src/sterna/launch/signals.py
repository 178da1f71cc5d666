"""The signals that end a command: counted, or as an exception. Those that are ignored (nohup) stay ignored."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def heard_hangup() -> tuple[signal.Signals, ...]:
    """SIGHUP, unless whoever started the command (nohup) has it ignored."""
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


@contextmanager
def _handled(numbers: tuple[signal.Signals, ...], handler: Callable[[], None]) -> Iterator[None]:
    """In the body of the `with` statement these signals call `handler`."""

    def handle(number: int, frame: FrameType | None) -> None:
        handler()

    before = {number: signal.getsignal(number) for number in numbers}
    caught = [number for number in numbers if before[number] is not signal.SIG_IGN]
    try:
        for number in caught:
            signal.signal(number, handle)
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])


@contextmanager
def ended_in_order(*numbers: signal.Signals) -> Iterator[None]:
    """In the body of the `with` statement the first of these signals raises KeyboardInterrupt, so that what was made goes
    again. Those that follow do not disturb that.
    """
    ended = False

    def end() -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise KeyboardInterrupt

    with _handled(numbers, end):
        yield


class Interrupts:
    """Counts the signals instead of dying of them.

    :ivar count: how many have come
    """

    def __init__(self) -> None:
        self.count = 0

    @contextmanager
    def caught(self) -> Iterator["Interrupts"]:
        """They are counted in the body of the `with` statement."""

        def add() -> None:
            self.count += 1

        with _handled(ENDING, add):
            yield self

    def check(self) -> None:
        """
        :raise KeyboardInterrupt: When there was one.
        """
        if self.count:
            raise KeyboardInterrupt
