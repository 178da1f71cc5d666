"""Who runs the guest? A question and its answer on a fresh connection, and the destination's record behind
the answer.

The question is ``STRNASK1`` and the migration's id, 16 bytes. The answer is ``STRNANS1``, a byte with the
outcome, and be64 CLOCK_REALTIME before the first guest instruction (0 unless running), and a checksum (XXH32,
be32) of those. The connection serves nothing else. A source that has learnt so that its guest runs confirms it on another
connection: ``STRNCNF1`` and the id, which has no answer. One that cancels a migration says so before it cuts the stream, which it
may do anywhere: ``STRNCNC1`` and the id. The answer is the connection's end. It changes what the destination says, and nothing
else.
"""

import struct
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import xxhash

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.uri import ListeningUri, Uri
from sterna.migration.errors import Cancelled, ChannelError, ConnectionRefused, InDoubt, Refused
from sterna.ownership import AttemptEvent, AttemptOutcome, Event, next_outcome, told
from sterna.ownership import answer as answer_to

QUESTION = b"STRNASK1"
CONFIRMATION = b"STRNCNF1"
CANCELLATION = b"STRNCNC1"
_ANSWER = struct.Struct(">8sBQ")
_CHECK_BYTES = 4
ANSWER_BYTES = _ANSWER.size + _CHECK_BYTES
_ANSWER_MAGIC = b"STRNANS1"
ID_BYTES = 16
_LATEST_NS = 1 << 62
_ANSWER_SECONDS = 5.0
_CANCELLATION_SECONDS = 1.0
"""The user waits for it."""
_RETRY_SECONDS = 0.2
_RECORD_LIMIT = 4096


class OutcomeRecord:
    """The destination's decisions, one per migration id, each made once, as `sterna.ownership` draws them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._outcomes: dict[bytes, tuple[AttemptOutcome, int]] = {}
        self._cancelled = b""
        self._ended = False

    def begin(self, migration_id: bytes) -> bool:
        """A stream names its id. False when that id was seen before: an id is good for one attempt.

        :raise Refused: When the program is ending.
        """
        with self._changed:
            if self._ended:
                raise Refused("it is ending")
            if migration_id in self._outcomes:
                return False
            self._apply(migration_id, AttemptEvent.OFFER)
            if len(self._outcomes) > _RECORD_LIMIT:
                # A source that asks for one that is forgotten stays in doubt, so only what never ran is.
                abandoned = (
                    key for key, (outcome, _) in self._outcomes.items() if outcome is AttemptOutcome.ABANDONED
                )
                del self._outcomes[next(abandoned)]
            return True

    def commit(self, migration_id: bytes) -> bool:
        """COMMIT arrived. False when the migration was abandoned before, or COMMIT came before."""
        with self._changed:
            before = self._outcome(migration_id)
            return before is not self._apply(migration_id, AttemptEvent.COMMIT)

    def running(self, migration_id: bytes, clock_ns: int) -> None:
        """The guest of a committed migration runs."""
        with self._changed:
            moved = self._apply(migration_id, AttemptEvent.STARTED, clock_ns)
        assert moved is AttemptOutcome.RUNNING, "a guest was started without COMMIT"

    def start_failed(self, migration_id: bytes) -> None:
        """The guest of a committed migration could not be started. It stands still, and stays so."""
        with self._changed:
            self._apply(migration_id, AttemptEvent.START_FAILED)

    def give_up(self, migration_id: bytes) -> AttemptOutcome:
        """The attempt has failed: the guest will not run here under this id, unless COMMIT came before."""
        with self._changed:
            return self._apply(migration_id, AttemptEvent.GIVEN_UP)

    def end(self) -> None:
        """The program ends: what is pending is abandoned, and nothing begins any more. So no COMMIT counts from here on."""
        with self._changed:
            self._ended = True
            for migration_id in self._outcomes:
                self._apply(migration_id, AttemptEvent.GIVEN_UP)

    def ask(self, migration_id: bytes) -> tuple[AttemptOutcome, int]:
        """The source asks: a pending migration is abandoned, a committed one is waited for.

        :return: UNKNOWN, RUNNING or ABANDONED, and the clock before the first guest instruction
        """
        with self._changed:
            self._apply(migration_id, AttemptEvent.ASKED)
            # Starting a guest takes no peer, so this wait ends.
            self._changed.wait_for(lambda: answer_to(self._outcome(migration_id)) is not None)
            return self._outcomes.get(migration_id, (AttemptOutcome.UNKNOWN, 0))

    def note_cancelled(self, migration_id: bytes) -> None:
        """The source says that it cancels."""
        self._cancelled = migration_id

    def was_cancelled(self, migration_id: bytes) -> bool:
        """Whether its source has said that it cancels."""
        return bool(migration_id) and self._cancelled == migration_id

    def confirms(self, migration_id: bytes) -> bool:
        """Whether a source's confirmation is of a guest that runs here."""
        with self._changed:
            return self._outcome(migration_id) is AttemptOutcome.RUNNING

    def _outcome(self, migration_id: bytes) -> AttemptOutcome:
        return self._outcomes.get(migration_id, (AttemptOutcome.UNKNOWN, 0))[0]

    def _apply(self, migration_id: bytes, event: AttemptEvent, clock_ns: int = 0) -> AttemptOutcome:
        """With the lock held."""
        before = self._outcome(migration_id)
        after = next_outcome(before, event)
        if after is not before:
            self._outcomes[migration_id] = (after, clock_ns)
            self._changed.notify_all()
        return after


def answer(channel: Channel, record: OutcomeRecord, migration_id: bytes) -> None:
    """Answer a question that was read from a fresh connection."""
    outcome, clock_ns = record.ask(migration_id)
    data = _ANSWER.pack(_ANSWER_MAGIC, outcome, clock_ns)
    channel.send(data + xxhash.xxh32_digest(data))


def ask(
    uri: ListeningUri,
    migration_id: bytes,
    timeout_seconds: float,
    cancellation: Cancellation,
    apply: Callable[[Event], bool],
) -> tuple[Event, int]:
    """Ask the destination until the migration is no longer in doubt.

    :param apply: takes each event that a try came to; whether it resolved the doubt
    :return: the event that did, and with RUNS the destination's clock before the first guest instruction
    :raise InDoubt: When nothing has in time; the text says what the last try came to.
    :raise Cancelled: When `cancellation` is set.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            outcome, clock_ns = _ask_once(uri, migration_id, min(_ANSWER_SECONDS, left), cancellation)
        except ConnectionRefused:  # which says nothing about whoever listened there before
            event, clock_ns, reason = Event.CONNECTION_REFUSED, 0, f"connection refused by {uri}"
        except ChannelError as error:
            event, clock_ns, reason = Event.NO_ANSWER, 0, str(error)
        else:
            event, reason = told(outcome), f"whoever listens at {uri} does not know this migration"
        if apply(event):
            return event, clock_ns
        if time.monotonic() + _RETRY_SECONDS >= deadline:
            if apply(Event.DEADLINE):
                return Event.DEADLINE, 0
            raise InDoubt(reason)
        cancellation.sleep(_RETRY_SECONDS)


def confirm(uri: Uri, migration_id: bytes, cancellation: Cancellation) -> None:
    """Tell the destination on a fresh connection that the source knows that the guest runs there. It waits for that; if it does
    not arrive, until the source's process ends.
    """
    with suppress(ChannelError, Cancelled):
        if isinstance(uri, ListeningUri):
            with uri.connect(cancellation, _ANSWER_SECONDS) as channel:
                channel.send(CONFIRMATION + migration_id)


def tell_cancelled(uri: Uri, migration_id: bytes, cancellation: Cancellation) -> None:
    """Tell the destination on a fresh connection that the migration is cancelled, before its stream ends, and let it say so; if
    it cannot be told in a short while, it says that the stream has ended.
    """
    with suppress(ChannelError, Cancelled):
        if isinstance(uri, ListeningUri):
            with uri.connect(cancellation, _CANCELLATION_SECONDS) as channel:
                channel.send(CANCELLATION + migration_id)
                channel.wait_readable(_CANCELLATION_SECONDS)


def _ask_once(
    uri: ListeningUri, migration_id: bytes, seconds: float, cancellation: Cancellation
) -> tuple[AttemptOutcome, int]:
    deadline = time.monotonic() + seconds
    with uri.connect(cancellation, seconds) as channel:
        channel.send(QUESTION + migration_id)
        data = bytearray(ANSWER_BYTES)
        view, got = memoryview(data), 0
        while got < len(data):
            if not channel.wait_readable(deadline - time.monotonic()):
                raise ChannelError(f"no answer from {uri} in {seconds:.1f} s")
            more = channel.readinto(view[got:])
            if not more:
                raise ChannelError(f"{uri} closed the connection without an answer")
            got += more
    return decode_answer(bytes(data), str(uri))


def decode_answer(data: bytes, peer: str) -> tuple[AttemptOutcome, int]:
    """
    :param data: `ANSWER_BYTES` bytes
    :return: UNKNOWN, RUNNING or ABANDONED, and the clock before the first guest instruction
    :raise ChannelError: When it is no answer.
    """
    body, check = data[: _ANSWER.size], data[_ANSWER.size :]
    magic, outcome, clock_ns = _ANSWER.unpack(body)
    if (
        xxhash.xxh32_digest(body) != check
        or magic != _ANSWER_MAGIC
        or outcome not in (AttemptOutcome.UNKNOWN, AttemptOutcome.RUNNING, AttemptOutcome.ABANDONED)
        or clock_ns >= _LATEST_NS
    ):
        raise ChannelError(f"{peer} does not answer as a sterna does")
    return AttemptOutcome(outcome), int(clock_ns)
