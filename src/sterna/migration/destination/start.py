"""Starting a guest that has been loaded: the handover as the destination does it. `source/handover.py` is the other half."""

import time
from collections.abc import Callable
from contextlib import ExitStack

from sterna.memory.digest import RamDigest
from sterna.migration import handshake
from sterna.migration.destination.context import DestinationContext
from sterna.migration.destination.greeting import Greeting
from sterna.migration.errors import Cancelled, ChannelError, Refused
from sterna.migration.handshake import Commit, PrivateCommand, PrivateMessage, Ready, Running
from sterna.migration.phase import Phase
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import Event
from sterna.stream.return_path import shut
from sterna.stream.wire import SectionType, StreamError

_ARRIVAL_SECONDS = 30.0
"""How long the guest may wait for its source's host to take what has the source give it up."""


class Start(Phase):
    """What both ways to start have in common."""

    def __init__(self, context: DestinationContext, greeting: Greeting) -> None:
        self._context, self._greeting = context, greeting
        self._id = greeting.id or context.own_id
        # SHUT(0) is with the kernel.
        self._told = False
        self._clock_note = ""

    def _start(self, stopped_ns: int | None = None, *, watched: bool = False) -> int:
        """Take the guest over, and start it.

        :param stopped_ns: when it was stopped, as CLOCK_REALTIME of this host, where the source tells
        :param watched: the source takes the end of this process for the guest's
        :return: CLOCK_REALTIME in ns just before its first instruction
        """
        guest = self._context.guest
        try:
            guest.ownership.apply(Event.TAKEN_OVER, self._id, watched=watched)
            guest.announce(self._context.parameters.announce_delays)
            if stopped_ns is not None:  # last of all: what comes after is no part of it
                longest_ns = time.monotonic_ns() - self._context.accepted_ns
                elapsed_ns = time.time_ns() - stopped_ns
                elapsed_ns, self._clock_note = handshake.clamp_elapsed(elapsed_ns, longest_ns)
                guest.advance_counter(elapsed_ns)
            clock_ns = guest.resume()
        except BaseException:
            # `resume` starts all of it or nothing.
            if not self._told:
                guest.ownership.apply(Event.GIVEN_BACK, self._id)
                self._context.record.start_failed(self._id)
            raise
        self._context.started = True
        return clock_ns


class StartAtEnd(Start):
    """Starts a guest whose source waits for nothing but the return path's end."""

    def run(self, stack: ExitStack) -> None:
        context, record = self._context, self._context.record
        context.channel.finish()
        if not (record.begin(self._id) and record.commit(self._id)):
            raise Refused("it is ending")
        if self._greeting.return_path:
            self._shut()
            context.channel.await_arrival(_ARRIVAL_SECONDS)
        record.running(self._id, self._start())
        context.confirmed = True
        context.progress.enter(MigrationStatus.COMPLETED)

    def _shut(self) -> None:
        """Have a QEMU give its guest up. On any other end of its return path it goes on with it.

        :raise ChannelError, Cancelled: When it has not been told, and never will be.
        """
        channel, ownership = self._context.channel, self._context.guest.ownership
        try:
            if channel.hung_up():
                raise ChannelError(
                    f"{channel.peer} closed the connection before it was told that the guest runs here"
                )
            ownership.apply(Event.SHUT_SENT, self._id)
            channel.send(shut(0).encode())
        except BaseException:
            ownership.apply(Event.SHUT_CUT, self._id)  # part of it says nothing
            self._context.record.start_failed(self._id)
            raise
        self._told = True


class StartOnCommit(Start):
    """Starts a guest when its source, a sterna, gives it up.

    :param digest: of RAM, where both ends have compared it
    """

    def __init__(self, context: DestinationContext, greeting: Greeting, digest: RamDigest | None) -> None:
        super().__init__(context, greeting)
        self._digest = digest

    def run(self, stack: ExitStack) -> None:
        context, digest = self._context, self._digest
        watches = context.watch is not None
        context.answer(PrivateMessage.READY, Ready(digest.hex if digest else "", watches))
        commit = handshake.decode(self._private_command(PrivateCommand.COMMIT), Commit)
        context.cancellation.check()
        if not context.record.commit(self._id):
            raise Refused("the migration was given up before its COMMIT arrived")
        clock_ns = self._start(commit.stop_ns + commit.clock_offset_ns, watched=commit.watched)
        note = self._clock_note
        context.record.running(self._id, clock_ns)
        context.progress.enter(MigrationStatus.COMPLETED, clock_note=note)
        with context.last_words():
            self._quietly(lambda: context.answer(PrivateMessage.RUNNING, Running(clock_ns, note)))
        self._quietly(self._wait_confirm)

    def _wait_confirm(self) -> None:
        self._private_command(PrivateCommand.CONFIRM)
        self._context.guest.ownership.apply(Event.CONFIRMED, self._id)
        self._context.confirmed = True

    def _private_command(self, kind: PrivateCommand) -> bytes:
        """Wait for a command after the end of the stream."""
        reader = self._context.reader
        at = reader.offset
        if reader.take(1)[0] != SectionType.COMMAND or int.from_bytes(reader.take(2), "big") != kind:
            raise reader.error(f"{kind.name} belongs here", at)
        return reader.take(int.from_bytes(reader.take(2), "big"))

    @staticmethod
    def _quietly(action: Callable[[], object]) -> None:
        try:
            action()
        except (ChannelError, Cancelled, StreamError):
            pass  # the source asks again if it must know
