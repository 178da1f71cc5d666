"""What the channels of a source have to send, and who sends it.

One thread hands out groups of pages, the channels take them as they get free. Between two syncs of the dirty log, and now and
then in between, comes a mark: each channel then tells the destination that it has sent all that was handed out before.
"""

import threading
from collections import deque
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from sterna.memory.bitmap import PageNumbers
from sterna.memory.ram import RamBlock
from sterna.memory.vectors import Vectors


@dataclass(frozen=True)
class Packets:
    """Packets as they go on the wire, which one channel sends in one go.

    :ivar vectors: where their bytes are; those of pages may change until they are sent, but must not go away
    :ivar headers: what `vectors` points into beside guest RAM
    :ivar final: whether the guest waits for it: nothing is paced then
    """

    vectors: Vectors
    headers: NDArray[np.uint8]
    final: bool


@dataclass(frozen=True)
class Group:
    """Pages of one block that the channel is to compress into one packet.

    :ivar pages: numbers in the stream's page size
    :ivar vectors: where their bytes are, as those of `Packets`
    :ivar number: of the packet
    """

    block: RamBlock
    pages: PageNumbers
    vectors: Vectors
    number: int
    final: bool


Job = Packets | Group


class Task(Enum):
    """What else a channel may be told to do."""

    SYNC = "sync"
    END = "end"


class Jobs:
    """The queue between the thread that looks at pages and the channels.

    :param channels: how many take from it
    :param room: jobs that wait before `put` does
    """

    def __init__(self, channels: int, room: int) -> None:
        self._channels = channels
        self._room = room
        lock = threading.Lock()
        self._to_take = threading.Condition(lock)
        """Notified when there may be something for a channel."""
        self._taken = threading.Condition(lock)
        """Notified when there is room, or all is done."""
        self._waiting: deque[tuple[int, Job]] = deque()
        self._marks = 0
        self._marks_of = [0] * channels
        # Tasks that have been given to a channel, or must be given to each, and are not done.
        self._open = 0
        self._sent_bytes = 0
        self._error: Exception | None = None
        self._ended = False

    # -- the thread that hands out -----------------------------------------------------------------------------

    def put(self, job: Job) -> None:
        """Hand out a job; wait while there are many.

        :raise Exception: What a channel failed with.
        """
        with self._taken:
            self._taken.wait_for(lambda: len(self._waiting) < self._room or self._error)
            self._check()
            self._waiting.append((self._marks, job))
            self._open += 1
            # Channels that wait have sent all SYNCs: any of them can take it.
            self._to_take.notify()

    def mark(self) -> None:
        """Each channel is to send SYNC after what was handed out so far."""
        with self._to_take:
            self._check()
            self._marks += 1
            self._open += self._channels
            self._to_take.notify_all()

    def drain(self) -> None:
        """Wait until everything that was handed out has been sent.

        :raise Exception: What a channel failed with.
        """
        with self._taken:
            self._taken.wait_for(lambda: self._open == 0 or self._error)
            self._check()

    def marked(self, size: int) -> None:
        """The caller has sent SYNC on each channel itself, in so many bytes, when all that was handed out had been sent."""
        with self._to_take:
            self._check()
            assert not self._open
            self._marks += 1
            self._marks_of = [self._marks] * self._channels
            self._sent_bytes += size

    def take_sent_bytes(self) -> int:
        """Bytes that the channels have sent since the last call."""
        with self._taken:
            size, self._sent_bytes = self._sent_bytes, 0
            return size

    def end(self) -> None:
        """The channels are to end, whatever is left."""
        with self._to_take:
            self._ended = True
            self._to_take.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    # -- the channels ------------------------------------------------------------------------------------------

    def take(self, channel: int) -> Job | Task:
        """What the calling channel is to do next; wait for it.

        :param channel: its number
        """
        with self._to_take:
            while True:
                if self._ended or self._error:
                    return Task.END
                marks = self._marks_of[channel]
                if self._waiting and self._waiting[0][0] == marks:
                    job = self._waiting.popleft()[1]
                    self._taken.notify()
                    return job
                if marks < self._marks:
                    # Nobody hands out work for before the mark any more.
                    self._marks_of[channel] += 1
                    return Task.SYNC
                self._to_take.wait()

    def done(self, size: int) -> None:
        """The calling channel has done what it took, in so many bytes."""
        with self._taken:
            self._sent_bytes += size
            self._open -= 1
            if not self._open:
                self._taken.notify()

    def fail(self, error: Exception) -> None:
        """The calling channel cannot go on. The first error counts."""
        with self._taken:
            self._error = self._error or error
            self._taken.notify()
            self._to_take.notify_all()
