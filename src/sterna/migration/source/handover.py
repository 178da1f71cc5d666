"""The source's last step: the guest changes hands, or may have, or does not.

Which of them, `sterna.ownership` decides from what is sent and received here.
"""

import time
from contextlib import ExitStack

from sterna.migration import handshake
from sterna.migration.channels import uri as uris
from sterna.migration.channels.exec import ExecChannel
from sterna.migration.channels.file import FileUri
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.errors import Cancelled, ChannelError, InDoubt, MigrationError, Unsynced
from sterna.migration.handshake import Commit, Ready
from sterna.migration.peer import NackError, PeerKind, ShutError
from sterna.migration.phase import Phase
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.statistics import Timeline
from sterna.migration.witness import CommandWitness, ConnectionWitness
from sterna.ownership import Event
from sterna.stream import sections
from sterna.stream.wire import StreamError


class HandOver(Phase):
    """Sends the stream's end, and the guest with it.

    :param timeline: when the guest was stopped, and what came after
    """

    def __init__(self, context: SourceContext, link: Link, end: bytes, timeline: Timeline) -> None:
        self._context, self._link, self._end, self._timeline = context, link, end, timeline
        self._query, self._channel, self._peer = context.outcome_query, link.channel, link.peer

    def run(self, stack: ExitStack) -> None:
        """
        :raise MigrationError: When the guest is the source's, or nobody knows (`InDoubt`).
        """
        progress, timeline = self._context.progress, self._timeline
        progress.sent_other(len(self._end), final=True)
        match self._link.greeted.kind:
            case PeerKind.STERNA:
                self._hand_to_sterna()
            case PeerKind.QEMU:
                timeline.digest = time.time_ns()
                self._hand_to_qemu()
                timeline.loaded = time.time_ns()
            case PeerKind.SILENT:
                timeline.digest = time.time_ns()
                self._hand_one_way()
                timeline.loaded = time.time_ns()
        parts = timeline.parts()
        progress.note(downtime_parts=parts, downtime_ms=parts.total)

    # -- to a sterna -----------------------------------------------------------------------------------------

    def _hand_to_sterna(self) -> None:
        progress, timeline = self._context.progress, self._timeline
        clock_offset_ns = self._link.greeted.clock_offset_ns
        self._channel.send(self._end)
        timeline.digest = time.time_ns()
        ready = self._await_ready()
        timeline.loaded = time.time_ns()
        if self._link.digest is not None:
            progress.note(verified=True, ram_digest_destination=ready.digest)
        clock_ns, note = self._commit(timeline.stop, clock_offset_ns)
        timeline.started = clock_ns - clock_offset_ns
        progress.note(clock_note=note)

    def _await_ready(self) -> Ready:
        """A sterna has all of the guest, and waits for COMMIT.

        :raise Refused, ChannelError, ProtocolError, Cancelled: When it does not come to that; the guest is the source's.
        """
        ready = self._peer.wait_ready()
        if not ready.watches:
            # Whoever cannot see this process end would have to keep the guest for ever, were it watched.
            self._query.stop_watching()
        return ready

    def _commit(self, stop_ns: int, clock_offset_ns: int) -> tuple[int, str]:
        """Give the guest to a sterna that is ready for it.

        :return: its CLOCK_REALTIME just before the first guest instruction, and its note on the clocks
        :raise MigrationError: When the guest is the source's, or nobody knows (`InDoubt`).
        """
        watched = self._query.watch is not None
        payload = handshake.encode(Commit(stop_ns, clock_offset_ns, watched))
        data = sections.command(handshake.PrivateCommand.COMMIT, payload)
        self._send_decisive(data, least=len(data))  # less has no checksum, and counts for nothing
        try:
            running = self._peer.wait_running()
        except (MigrationError, StreamError) as error:
            if isinstance(error, NackError) and error.nack.abandoned == self._query.migration_id.hex():
                self._query.apply(Event.ABANDONED)
                raise
            self._query.apply(Event.CONNECTION_LOST)
            if isinstance(error, Cancelled) and not isinstance(self._query.uri, uris.ListeningUri):
                self._keep_connection()  # it cannot be asked on another
            self._channel.close()
            return self._ask(error), ""
        self._query.apply(Event.RUNS)
        self._channel.watch(self._context.closing)
        self._peer.confirm()
        return running.clock_ns, running.clock_note

    def _ask(self, error: Exception) -> int:
        try:
            return self._resolve()
        except InDoubt as silent:
            raise InDoubt(f"{error}; then {silent}") from error
        except MigrationError as word:
            raise MigrationError(f"{error}; {word}") from error

    # -- to others -------------------------------------------------------------------------------------------

    def _hand_to_qemu(self) -> None:
        """Send the stream's end to a QEMU, which starts the guest upon it."""
        self._query.kind = PeerKind.QEMU
        self._peer.await_loading()
        self._send_decisive(self._end, least=1)
        try:
            self._peer.wait_shut()
        except ShutError as error:
            self._query.apply(Event.SHUT_WITH_ERROR)
            raise InDoubt(f"{error} after the end of the stream; {self._query.advice}") from error
        except Cancelled:
            # Nobody but the connection tells, and its time limit or its user's cancel change nothing any more.
            self._keep_connection()
            self._resolve()
            return
        except (MigrationError, StreamError) as error:
            self._query.apply(Event.CONNECTION_LOST)
            raise InDoubt(f"{ConnectionWitness.silence} ({error}); {self._query.advice}") from error
        self._query.apply(Event.RUNS)

    def _hand_one_way(self) -> None:
        """Send the stream's end where nobody answers."""
        if isinstance(self._query.uri, FileUri):
            # Nobody reads it before it is complete.
            self._channel.send(self._end)
            try:
                self._channel.finish()
            except Unsynced:
                self._query.apply(Event.SAVED)
                raise
            self._query.apply(Event.SAVED)
            return
        self._query.kind = PeerKind.SILENT
        self._channel.await_reader()
        self._send_decisive(self._end, least=1)
        try:
            self._channel.finish()
        except Cancelled:
            if isinstance(self._channel, ExecChannel):
                self._query.witness = CommandWitness(self._channel)
            self._resolve()
            return
        except MigrationError as error:
            self._query.apply(Event.NO_ANSWER)
            raise InDoubt(f"{error}, after it was given all of the guest; {self._query.advice}") from error
        self._query.apply(Event.HANDED_ON)

    # -- what all of them need -------------------------------------------------------------------------------

    def _resolve(self) -> int:
        """Find out who runs the guest, for as long as the user lets it take when the switchover's time limit has passed.

        :return: when it began to run there, CLOCK_REALTIME of the destination in ns
        """
        seconds = self._context.parameters.seconds("x-sterna-doubt-timeout")
        return self._query.wait(seconds, self._context.closing)

    def _keep_connection(self) -> None:
        """What the destination says of the guest is heard also when this migration's channel is closed."""
        if not isinstance(self._channel, SocketChannel):
            return
        try:
            kept = self._channel.duplicate(self._context.closing)
        except OSError:  # no descriptor to spare
            return
        self._query.witness = ConnectionWitness(kept, self._peer, self._query.kind, self._query.migration_id)

    def _send_decisive(self, data: bytes, *, least: int) -> None:
        """Send what lets the destination start.

        :param least: bytes of it that could be enough
        """
        self._channel.decisive_at = self._channel.transferred + least
        self._query.apply(Event.COMMIT_SENT)
        try:
            self._channel.send(data)
        except (ChannelError, Cancelled) as error:
            if self._channel.transferred < self._channel.decisive_at:
                self._query.apply(Event.COMMIT_CUT)
                raise
            # Whoever has only part of it learns that there is no more, and may still say what it does.
            self._channel.end_writing()
            self._keep_connection()
            raise InDoubt(f"{error}, while the stream's end was sent; {self._query.advice}") from error
