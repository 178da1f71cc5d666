"""Connections of multifd channels that wait for the migration that they belong to.

QEMU's channels carry no name of their migration, and may connect before the main channel has been recognised. So they wait
here for the next attempt, or join the one that is under way.
"""

import threading
import time
from collections.abc import Callable

from sterna.migration.channels.sockets import SocketChannel
from sterna.stream.multifd.format import CHANNEL_LIMIT, Init

WAIT_SECONDS = 10.0
"""How long a channel waits for a main channel."""
_POLL_SECONDS = 0.2
"""How often a waiting channel is looked at: whether its peer is still there."""

Admit = Callable[[Init, SocketChannel], None]


class PendingChannels:
    """Of one listener."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[Init, SocketChannel]] = []
        self._admit: Admit | None = None
        self._closed = False

    def enter(self, init: Init, channel: SocketChannel) -> None:
        """A connection with an initial packet has come. It is closed here, or whoever admits it. Returns when one of the two
        has it, or when it has waited for too long.
        """
        with self._changed:
            # A channel that has been given up belonged to an attempt that is over.
            if self._closed or channel.hung_up():
                channel.close()
                return
            if self._admit is not None:
                self._admit(init, channel)
                return
            if len(self._waiting) >= CHANNEL_LIMIT:
                self._waiting.pop(0)[1].close()
            entry = (init, channel)
            self._waiting.append(entry)
            deadline = time.monotonic() + WAIT_SECONDS
            while not self._changed.wait_for(lambda: entry not in self._waiting, _POLL_SECONDS):
                if channel.hung_up() or time.monotonic() >= deadline:
                    self._waiting.remove(entry)
                    channel.close()

    def open(self, admit: Admit) -> None:
        """An attempt begins: it gets the channels that wait, and those that come until `shut`."""
        with self._changed:
            self._admit = admit
            for init, channel in self._leave():
                if channel.hung_up():
                    channel.close()
                else:
                    admit(init, channel)

    def shut(self) -> None:
        """The attempt has ended. What it was given it has closed."""
        with self._changed:
            self._admit = None

    def sweep(self) -> None:
        """Let go at once of those whose peer has gone."""
        with self._changed:
            gone = [entry for entry in self._waiting if entry[1].hung_up()]
            self._waiting = [entry for entry in self._waiting if entry not in gone]
            for _, channel in gone:
                channel.close()
            self._changed.notify_all()

    def close(self) -> None:
        """Nobody is admitted any more."""
        with self._changed:
            self._closed = True
            for _, channel in self._leave():
                channel.close()

    def _leave(self) -> list[tuple[Init, SocketChannel]]:
        """Who has waited so far; nobody does any more."""
        waiting, self._waiting = self._waiting, []
        self._changed.notify_all()
        return waiting
