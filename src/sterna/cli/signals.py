"""The signals that end a command in order."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


def heard_hangup() -> tuple[signal.Signals, ...]:
    """SIGHUP, unless whoever started the command (nohup) has it ignored."""
    return () if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (signal.SIGHUP,)


@contextmanager
def ended_in_order(*numbers: signal.Signals) -> Iterator[None]:
    """In the body of the `with` statement the first of these signals raises KeyboardInterrupt, so that what was made goes
    again. Those that follow do not disturb that. Ignored ones stay ignored.
    """
    ended = False

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal ended
        if not ended:
            ended = True
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in numbers}
    caught = [number for number in numbers if before[number] is not signal.SIG_IGN]
    try:
        for number in caught:
            signal.signal(number, end)
        yield
    finally:
        for number in caught:
            signal.signal(number, before[number])
