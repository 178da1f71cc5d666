"""Connections of multifd channels, between the listener and the migration that they belong to.

QEMU's channels carry no name of their migration, and may connect before the main channel has been recognised. So they wait
here for the next attempt, or join the one that is under way.
"""

import threading
import time
from collections.abc import Callable

from sterna.migration.channels.sockets import SocketChannel
from sterna.stream.multifd import CHANNEL_LIMIT, Init

_WAIT_SECONDS = 10.0
"""How long a channel waits for a main channel."""

Admit = Callable[[Init, SocketChannel], None]


class Lobby:
    """Of one listener."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[float, Init, SocketChannel]] = []
        self._admit: Admit | None = None
        self._closed = False

    def enter(self, init: Init, channel: SocketChannel) -> None:
        """A connection with an initial packet has come. The lobby closes it, or whoever admits it."""
        with self._lock:
            # A channel that has been given up belonged to an attempt that is over.
            if self._closed or channel.hung_up():
                channel.close()
            elif self._admit is not None:
                self._admit(init, channel)
            else:
                self._clear(time.monotonic() - _WAIT_SECONDS)
                if len(self._waiting) >= CHANNEL_LIMIT:
                    self._waiting.pop(0)[2].close()
                self._waiting.append((time.monotonic(), init, channel))

    def open(self, admit: Admit) -> None:
        """An attempt begins: it gets the channels that wait, and those that come until `shut`."""
        with self._lock:
            self._clear(time.monotonic() - _WAIT_SECONDS)
            waiting, self._waiting = self._waiting, []
            self._admit = admit
            for _, init, channel in waiting:
                admit(init, channel)

    def shut(self) -> None:
        """The attempt has ended. What it was given it has closed."""
        with self._lock:
            self._admit = None

    def close(self) -> None:
        """Nobody is admitted any more."""
        with self._lock:
            self._closed = True
            self._clear(time.monotonic())

    def _clear(self, before: float) -> None:
        """Close what has waited since `before`, and what the peer has given up."""
        kept = []
        for entry in self._waiting:
            if entry[0] <= before or entry[2].hung_up():
                entry[2].close()
            else:
                kept.append(entry)
        self._waiting = kept
