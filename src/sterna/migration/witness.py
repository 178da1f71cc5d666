"""Witnesses of a migration in doubt: the connection, or the command, that may still report unasked what became of the guest."""

import os
import select
from typing import NamedTuple, Protocol

from sterna.migration import handshake
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.exec import ExecChannel
from sterna.migration.errors import Cancelled, ChannelError, MigrationError, ProtocolError
from sterna.migration.handshake import PrivateMessage, Running
from sterna.migration.peer import NackError, Peer, PeerKind, ShutError
from sterna.ownership import Event
from sterna.stream.wire import ReturnPathType, StreamError


class Said(NamedTuple):
    """What a witness has told: its last word, whether or not that resolves the doubt.

    :ivar text: the same in a few words
    :ivar clock_ns: with RUNS, the destination's CLOCK_REALTIME before the first guest instruction, where that is told
    """

    event: Event
    text: str
    clock_ns: int = 0


class Witness(Protocol):
    """A source of reports, with a descriptor that polls readable when there may be one.

    :ivar question: what a later poll may find out, as the end of "whether ..."
    :ivar silence: the error when no report has come
    """

    question: str
    silence: str

    def fileno(self) -> int:
        """The descriptor to poll for POLLIN."""
        ...

    def poll(self) -> Said | None:
        """The report, if it has come; None when not. Not to be called after one has.

        :raise Cancelled: When the program ends.
        """
        ...

    def confirm(self) -> None:
        """The source knows that the guest runs at the destination."""
        return

    def close(self) -> None:
        """Nothing more will be heard."""
        ...


class ConnectionWitness(Witness):
    """The migration's own connection, kept open: the destination may say what it did with the guest at any time.

    :param channel: the connection, which is closed with this
    :param peer: reads it from now on
    """

    question = "the destination has said so since"
    silence = "the destination has all of the guest, and has not said that it runs it"

    def __init__(self, channel: Channel, peer: Peer, kind: PeerKind, migration_id: bytes) -> None:
        self._channel, self._peer, self._kind, self._id = channel, peer, kind, migration_id
        peer.move(channel)

    def fileno(self) -> int:
        return self._channel.descriptors()[0]

    def poll(self) -> Said | None:
        try:
            message = self._peer.next_now()
            if message is None:
                return None
            if self._kind is PeerKind.STERNA and message.type == PrivateMessage.RUNNING:
                return Said(Event.RUNS, "it runs there", handshake.decode(message.payload, Running).clock_ns)
            if self._kind is PeerKind.QEMU and message.type == ReturnPathType.SHUT:
                return Said(Event.RUNS, "it runs there")
            raise ProtocolError(f"{self._channel.peer} sent a message of type {message.type:#x}")
        except NackError as error:
            recorded = error.nack.abandoned == self._id.hex()
            return Said(Event.ABANDONED if recorded else Event.NO_ANSWER, str(error))
        except ShutError as error:
            return Said(Event.SHUT_WITH_ERROR, f"{error} after the end of the stream")
        except Cancelled:
            raise
        except (MigrationError, StreamError) as error:
            return Said(Event.CONNECTION_LOST, f"{self.silence} ({error})")

    def confirm(self) -> None:
        if self._kind is PeerKind.STERNA:
            self._peer.confirm()

    def close(self) -> None:
        self._channel.close()


class CommandWitness(Witness):
    """A command that was given all of the guest, and has not ended."""

    question = "the command has ended since"

    def __init__(self, channel: ExecChannel) -> None:
        self._channel = channel
        self._fd = channel.watch_exit()
        self.silence = f"{channel.peer} has not ended, after it was given all of the guest"

    def fileno(self) -> int:
        return self._fd

    def poll(self) -> Said | None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if not poll.poll(0):
            return None
        try:
            self._channel.check_exit()
        except ChannelError as error:
            return Said(Event.NO_ANSWER, f"{error}, after it was given all of the guest")
        return Said(Event.HANDED_ON, "the command has all of the guest")

    def close(self) -> None:
        os.close(self._fd)
