"""The source's last step: the guest changes hands, or may have, or does not.

Which of them, `sterna.ownership` decides from what is sent and received here.
"""

from dataclasses import dataclass, field

from sterna.migration import doubt, handshake
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.file import FileUri
from sterna.migration.errors import Cancelled, ChannelError, InDoubt, MigrationError, Unsynced
from sterna.migration.handshake import Commit, Ready
from sterna.migration.peer import NackError, Peer, ShutError
from sterna.migration.process import ProcessWatch
from sterna.ownership import Event, Ownership, Standing
from sterna.stream import sections
from sterna.stream.wire import StreamError

_NOT_SAID = "the destination has all of the guest, and has not said that it runs it"


@dataclass
class Doubt:
    """What a source knows of who runs the guest of one migration.

    :ivar migration_id: 16 bytes
    :ivar watch: the destination's process, when that is on this host; None when its end cannot be seen
    """

    ownership: Ownership
    migration_id: bytes
    uri: uris.Uri
    watch: ProcessWatch | None = field(default=None)
    _forced: bool = field(default=False, init=False)

    @property
    def advice(self) -> str:
        """Who may run the guest, and how its user finds out."""
        return (
            f"the guest stays paused here and may run at {self.uri}: look there. If it does, end this one with 'quit'; "
            "if it never will, 'cont -f' (QMP: cont with x-sterna-force) runs it here; 'resolve_doubt' asks again"
        )

    def apply(self, event: Event) -> Standing:
        """Something happened to this migration."""
        return self.ownership.apply(event, self.migration_id)

    def resolve(self, seconds: float, cancellation: Cancellation, uri: uris.Uri | None = None) -> int:
        """Find out who runs the guest, by asking the destination and by looking whether its process has ended.

        :param uri: where to ask, when that is not where the guest was sent
        :return: the destination runs it: its CLOCK_REALTIME just before the first guest instruction
        :raise MigrationError: When the destination does not run it and never will, or its user had it run here meanwhile: it is
            the source's.
        :raise InDoubt: When neither can be told in so many seconds.
        """
        uri = uri or self.uri
        reason = f"{uri} cannot be asked whether it runs the guest"
        told, clock_ns = Event.NO_ANSWER, 0
        try:
            if isinstance(uri, uris.ListeningUri):
                told, clock_ns = doubt.ask(uri, self.migration_id, seconds, cancellation, self._is_over)
            else:
                self._is_over(told)
        except (InDoubt, Cancelled) as silent:
            reason = str(silent)
            self._forced = True  # if it is over all the same: no answer ended it
        match self.ownership.standing:
            case Standing.AWAY:
                self._confirm(uri, cancellation)
                return clock_ns
            case Standing.IN_DOUBT:
                raise InDoubt(f"{reason}; {self.advice}")
            case _ if self._forced:
                also = ", and the destination says that it runs there too" if told is Event.RUNS else ""
                raise MigrationError(f"the guest was made to run here by force meanwhile{also}")
            case _:
                raise MigrationError("the destination did not start the guest, and never will")

    def _is_over(self, event: Event) -> bool:
        # Nothing but its user's word ends a doubt between two answers.
        self._forced = self.ownership.standing is not Standing.IN_DOUBT
        self.apply(event)
        if self.watch is not None and self.watch.ended:
            self.apply(Event.PROCESS_ENDED)
        return self.ownership.standing is not Standing.IN_DOUBT

    def _confirm(self, uri: uris.Uri, cancellation: Cancellation) -> None:
        """The destination waits for that; if it does not arrive, until this process ends."""
        try:
            if isinstance(uri, uris.ListeningUri):
                doubt.confirm(uri, self.migration_id, cancellation)
        except (ChannelError, Cancelled):
            pass

    def tell_cancelled(self, cancellation: Cancellation) -> None:
        """Let the destination say so; if it cannot be told, it says that the stream has ended."""
        try:
            if isinstance(self.uri, uris.ListeningUri):
                doubt.tell_cancelled(self.uri, self.migration_id, cancellation)
        except (ChannelError, Cancelled):
            pass

    def stop_watching(self) -> None:
        """The end of the destination's process tells nothing any more."""
        if self.watch is not None:
            self.watch.close()
            self.watch = None


@dataclass
class HandOver:
    """The end of one migration at the source, whose guest is stopped.

    :ivar closing: set when the program ends; only that ends a question to the destination
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
            self.channel.close()
            return self._ask(error, doubt_seconds), ""
        self.doubt.apply(Event.RUNS)
        self.channel.watch(self.closing)
        self.peer.confirm()
        return running.clock_ns, running.clock_note

    def _ask(self, error: Exception, seconds: float) -> int:
        try:
            return self.doubt.resolve(seconds, self.closing)
        except InDoubt as silent:
            raise InDoubt(f"{error}; then {silent}") from error
        except MigrationError as word:
            raise MigrationError(f"{error}; {word}") from error

    def end_to_qemu(self, end: bytes) -> None:
        """Send the stream's end to a QEMU, which starts the guest upon it.

        :raise MigrationError: When the guest is the source's, or nobody knows (`InDoubt`).
        """
        self.peer.await_loading()
        self._send_decisive(end, least=1)
        try:
            self.peer.wait_shut()
        except ShutError as error:
            self.doubt.apply(Event.SHUT_WITH_ERROR)
            raise InDoubt(f"{error} after the end of the stream; {self.doubt.advice}") from error
        except Cancelled as silent:
            self.doubt.apply(Event.DEADLINE)
            raise InDoubt(f"{_NOT_SAID}; {self.doubt.advice}") from silent
        except (MigrationError, StreamError) as error:
            self.doubt.apply(Event.CONNECTION_LOST)
            raise InDoubt(f"{_NOT_SAID} ({error}); {self.doubt.advice}") from error
        self.doubt.apply(Event.RUNS)

    def end_one_way(self, end: bytes) -> None:
        """Send the stream's end where nobody answers.

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
        self.channel.await_reader()
        self._send_decisive(end, least=1)
        try:
            self.channel.finish()
        except MigrationError as error:
            self.doubt.apply(Event.NO_ANSWER)
            what = f"{self.doubt.uri} has not ended" if isinstance(error, Cancelled) else str(error)
            raise InDoubt(f"{what}, after it was given all of the guest; {self.doubt.advice}") from error
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
            raise InDoubt(f"{error}, while the stream's end was sent; {self.doubt.advice}") from error
