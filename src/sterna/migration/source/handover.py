"""The source's last step: the guest changes hands, or may have, or does not.

Which of them, `sterna.ownership` decides from what is sent and received here.
"""

from dataclasses import dataclass

from sterna.migration import handshake
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.exec import ExecChannel
from sterna.migration.channels.file import FileUri
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.errors import Cancelled, ChannelError, InDoubt, MigrationError, Unsynced
from sterna.migration.handshake import Commit, Ready
from sterna.migration.peer import NackError, Peer, PeerKind, ShutError
from sterna.migration.source.doubt import Doubt
from sterna.migration.witness import CommandWitness, ConnectionWitness
from sterna.ownership import Event
from sterna.stream import sections
from sterna.stream.wire import StreamError


@dataclass
class HandOver:
    """The end of one migration at the source, whose guest is stopped.

    :ivar closing: set when the program ends
    """

    doubt: Doubt
    channel: Channel
    peer: Peer
    closing: Cancellation

    def await_ready(self) -> Ready:
        """A sterna has all of the guest, and waits for COMMIT.

        :raise Refused, ChannelError, ProtocolError, Cancelled: When it does not come to that; the guest is the source's.
        """
        ready = self.peer.wait_ready()
        if not ready.watches:
            # Whoever cannot see this process end would have to keep the guest for ever, were it watched.
            self.doubt.stop_watching()
        return ready

    def commit(self, stop_ns: int, clock_offset_ns: int, doubt_seconds: float) -> tuple[int, str]:
        """Give the guest to a sterna that is ready for it.

        :return: its CLOCK_REALTIME just before the first guest instruction, and its note on the clocks
        :raise MigrationError: When the guest is the source's, or nobody knows (`InDoubt`).
        """
        watched = self.doubt.watch is not None
        payload = handshake.encode(Commit(stop_ns, clock_offset_ns, watched))
        data = sections.command(handshake.PrivateCommand.COMMIT, payload)
        self._send_decisive(data, least=len(data))  # less has no checksum, and counts for nothing
        try:
            running = self.peer.wait_running()
        except (MigrationError, StreamError) as error:
            if isinstance(error, NackError) and error.nack.abandoned == self.doubt.migration_id.hex():
                self.doubt.apply(Event.ABANDONED)
                raise
            self.doubt.apply(Event.CONNECTION_LOST)
            if isinstance(error, Cancelled) and not isinstance(self.doubt.uri, uris.ListeningUri):
                self._keep_connection()  # it cannot be asked on another
            self.channel.close()
            return self._ask(error, doubt_seconds), ""
        self.doubt.apply(Event.RUNS)
        self.channel.watch(self.closing)
        self.peer.confirm()
        return running.clock_ns, running.clock_note

    def _ask(self, error: Exception, seconds: float) -> int:
        try:
            return self.doubt.wait(seconds, self.closing)
        except InDoubt as silent:
            raise InDoubt(f"{error}; then {silent}") from error
        except MigrationError as word:
            raise MigrationError(f"{error}; {word}") from error

    def end_to_qemu(self, end: bytes, doubt_seconds: float) -> None:
        """Send the stream's end to a QEMU, which starts the guest upon it.

        :param doubt_seconds: how long it may take to say so when the switchover's time limit has passed
        :raise MigrationError: When the guest is the source's, or nobody knows (`InDoubt`).
        """
        self.doubt.kind = PeerKind.QEMU
        self.peer.await_loading()
        self._send_decisive(end, least=1)
        try:
            self.peer.wait_shut()
        except ShutError as error:
            self.doubt.apply(Event.SHUT_WITH_ERROR)
            raise InDoubt(f"{error} after the end of the stream; {self.doubt.advice}") from error
        except Cancelled:
            # Nobody but the connection tells, and its time limit or its user's cancel change nothing any more.
            self._keep_connection()
            self.doubt.wait(doubt_seconds, self.closing)
            return
        except (MigrationError, StreamError) as error:
            self.doubt.apply(Event.CONNECTION_LOST)
            raise InDoubt(f"{ConnectionWitness.silence} ({error}); {self.doubt.advice}") from error
        self.doubt.apply(Event.RUNS)

    def _keep_connection(self) -> None:
        """What the destination says of the guest is heard also when this migration's channel is closed."""
        if not isinstance(self.channel, SocketChannel):
            return
        try:
            kept = self.channel.duplicate(self.closing)
        except OSError:  # no descriptor to spare
            return
        self.doubt.witness = ConnectionWitness(kept, self.peer, self.doubt.kind, self.doubt.migration_id)

    def end_one_way(self, end: bytes, doubt_seconds: float) -> None:
        """Send the stream's end where nobody answers.

        :param doubt_seconds: how long a command may take to end when the switchover's time limit has passed
        :raise MigrationError: When the guest is the source's, or nobody knows (`InDoubt`).
        """
        if isinstance(self.doubt.uri, FileUri):
            # Nobody reads it before it is complete.
            self.channel.send(end)
            try:
                self.channel.finish()
            except Unsynced:
                self.doubt.apply(Event.SAVED)
                raise
            self.doubt.apply(Event.SAVED)
            return
        self.doubt.kind = PeerKind.SILENT
        self.channel.await_reader()
        self._send_decisive(end, least=1)
        try:
            self.channel.finish()
        except Cancelled:
            if isinstance(self.channel, ExecChannel):
                self.doubt.witness = CommandWitness(self.channel)
            self.doubt.wait(doubt_seconds, self.closing)
            return
        except MigrationError as error:
            self.doubt.apply(Event.NO_ANSWER)
            raise InDoubt(f"{error}, after it was given all of the guest; {self.doubt.advice}") from error
        self.doubt.apply(Event.HANDED_ON)

    def _send_decisive(self, data: bytes, *, least: int) -> None:
        """Send what lets the destination start.

        :param least: bytes of it that could be enough
        """
        self.channel.decisive_at = self.channel.transferred + least
        self.doubt.apply(Event.COMMIT_SENT)
        try:
            self.channel.send(data)
        except (ChannelError, Cancelled) as error:
            if self.channel.transferred < self.channel.decisive_at:
                self.doubt.apply(Event.COMMIT_CUT)
                raise
            # Whoever has only part of it learns that there is no more, and may still say what it does.
            self.channel.end_writing()
            self._keep_connection()
            raise InDoubt(f"{error}, while the stream's end was sent; {self.doubt.advice}") from error
