"""What a source knows of who runs its guest, and how it finds out."""

import select
import time
from dataclasses import dataclass, field

from sterna.migration import outcome_query
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.errors import Cancelled, InDoubt, MigrationError
from sterna.migration.peer import PeerKind
from sterna.migration.process import ProcessWatch
from sterna.migration.witness import Said, Witness
from sterna.ownership import Event, Ownership, OwnershipState


@dataclass
class OutcomeQuery:
    """What a source knows of who runs the guest of one migration.

    :ivar migration_id: 16 bytes
    :ivar watch: the destination's process, when that is on this host; None when its end cannot be seen
    :ivar kind: what the destination is: only a sterna that listens can be asked
    :ivar witness: who may still say what became of the guest
    """

    ownership: Ownership
    migration_id: bytes
    uri: uris.Uri
    watch: ProcessWatch | None = field(default=None)
    kind: PeerKind = field(default=PeerKind.STERNA, init=False)
    witness: Witness | None = field(default=None, init=False)
    _heard: Said | None = field(default=None, init=False)
    _ended_by: Event | None = field(default=None, init=False)
    _waiting: Cancellation | None = field(default=None, init=False)

    @property
    def advice(self) -> str:
        """Who may run the guest, and how its user finds out."""
        how = " (QMP: query-status)" if self.kind is PeerKind.QEMU else ""
        again = ""
        if self._can_ask(self.uri):
            again = "; 'resolve_doubt' asks again"
        elif self.witness is not None:
            again = f"; 'resolve_doubt' looks whether {self.witness.question}"
        elif self.watch is not None:
            again = "; 'resolve_doubt' looks whether its process has ended since"
        return (
            f"the guest stays paused here and may run at {self.uri}: look there{how}. If it does, end this one with 'quit'; "
            f"if it never will, 'cont -f' (QMP: cont with x-sterna-force) runs it here{again}"
        )

    def _can_ask(self, uri: uris.Uri) -> bool:
        """Whoever else listens would take the question for a migration, and be used up by it."""
        return self.kind is PeerKind.STERNA and isinstance(uri, uris.ListeningUri)

    def apply(self, event: Event) -> OwnershipState:
        """Something happened to this migration."""
        before = self.ownership.state
        after = self.ownership.apply(event, self.migration_id)
        if before is OwnershipState.IN_DOUBT and after is not before:
            self._ended_by = event
        return after

    def wait(self, seconds: float, closing: Cancellation) -> int:
        """As `resolve`; `stop_waiting` ends it too."""
        with Cancellation() as waiting:
            self._waiting = waiting
            if closing.is_set:  # else whoever sets it has this stopped
                waiting.set()
            try:
                return self.resolve(seconds, closing, waiting=waiting)
            finally:
                self._waiting = None

    def stop_waiting(self) -> None:
        """End `wait` in whichever thread; the migration stays in doubt. From any thread."""
        if (waiting := self._waiting) is not None:
            waiting.set()

    def resolve(
        self,
        seconds: float,
        cancellation: Cancellation,
        uri: uris.Uri | None = None,
        waiting: Cancellation | None = None,
    ) -> int:
        """Find out who runs the guest: ask the destination if it can be asked, hear what it says by itself, and look whether its
        process has ended.

        :param uri: where to ask, when that is not where the guest was sent; whoever listens there is asked, whatever it is
        :param waiting: ends the wait in place of `cancellation`
        :return: the destination runs it: its CLOCK_REALTIME just before the first guest instruction, 0 where nobody tells; or
            has all of it (`OwnershipState.HANDED_ON`): 0
        :raise MigrationError: When the destination does not run it and never will, or its user had it run here meanwhile: it is
            the source's.
        :raise InDoubt: When neither can be told in so many seconds.
        """
        where = uri or self.uri
        told, clock_ns, reason = Event.NO_ANSWER, 0, ""
        try:
            if self._can_ask(where) or (uri is not None and isinstance(uri, uris.ListeningUri)):
                assert isinstance(where, uris.ListeningUri)
                told, clock_ns = outcome_query.ask(
                    where, self.migration_id, seconds, waiting or cancellation, self._is_over
                )
            else:
                self._wait(seconds, waiting or cancellation)
        except InDoubt as silent:
            reason = str(silent)
        except Cancelled:
            self.apply(Event.CANCELLED)
            reason = Event.CANCELLED.value
        heard = self._heard.event if self._heard is not None else None
        match self.ownership.state:
            case OwnershipState.AWAY if told is Event.RUNS:
                outcome_query.confirm(where, self.migration_id, cancellation)
                return clock_ns
            case OwnershipState.AWAY if self.witness is not None and self._heard is not None:
                self.witness.confirm()
                return self._heard.clock_ns
            case OwnershipState.AWAY | OwnershipState.HANDED_ON:
                return 0
            case OwnershipState.IN_DOUBT:
                raise InDoubt(f"{reason}; {self.advice}")
            case _ if self._ended_by is None:  # nothing but its user's word resolves a doubt besides
                also = (
                    ", and the destination says that it runs there too" if Event.RUNS in (told, heard) else ""
                )
                raise MigrationError(f"the guest was made to run here by force meanwhile{also}")
            case _ if self._ended_by is Event.PROCESS_ENDED:
                raise MigrationError(
                    "the destination's process has ended, and with it the guest, if it ran there"
                )
            case _:
                raise MigrationError("the destination did not start the guest, and never will")

    def _is_over(self, event: Event) -> bool:
        self.apply(event)
        return self._poll()

    def _poll(self) -> bool:
        """Take what there is to hear and to see.

        :return: whether it is no longer in doubt
        """
        if self.witness is not None and (said := self.witness.poll()) is not None:
            self._heard = said
            if self.apply(said.event) is OwnershipState.IN_DOUBT:
                self._dismiss()
        if self.watch is not None and self.watch.ended:
            self.apply(Event.PROCESS_ENDED)
        return self.ownership.state is not OwnershipState.IN_DOUBT

    def _wait(self, seconds: float, cancellation: Cancellation) -> None:
        """Wait for what there is to hear and to see.

        :raise InDoubt: When nothing has resolved it in time; the text says what was heard.
        :raise Cancelled: When `cancellation` is set.
        """
        deadline = time.monotonic() + seconds
        while not self._poll():
            sources = [source for source in (self.witness, self.watch) if source is not None]
            left = deadline - time.monotonic()
            if not sources or left <= 0:
                self.apply(Event.DEADLINE)
                silence = f"{self.uri} cannot be asked whether it runs the guest"
                if self.witness is not None:
                    silence = self.witness.silence
                elif self._heard is not None:
                    silence = self._heard.text
                raise InDoubt(silence)
            poll = select.poll()
            for source in (*sources, cancellation):
                poll.register(source.fileno(), select.POLLIN)
            poll.poll(left * 1000)
            cancellation.check()

    def _dismiss(self) -> None:
        if self.witness is not None:
            self.witness.close()
            self.witness = None

    def stop_watching(self) -> None:
        """Nothing that is heard or seen of the destination tells anything any more."""
        self._dismiss()
        if self.watch is not None:
            self.watch.close()
            self.watch = None
