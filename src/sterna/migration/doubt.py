"""Who runs the guest? A question and its answer on a fresh connection, and the destination's record behind
the answer.

The question is ``STRNASK1`` and the migration's id, 16 bytes. The answer is ``STRNANS1``, a byte with the
outcome, and be64 CLOCK_REALTIME before the first guest instruction (0 unless running), and a checksum (XXH32,
be32) of those. The connection serves nothing else.
"""

import struct
import threading
import time
from enum import IntEnum

import xxhash

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.uri import ListeningUri
from sterna.migration.errors import ChannelError, ConnectionRefused, InDoubt

QUESTION = b"STRNASK1"
_ANSWER = struct.Struct(">8sBQ")
_CHECK_BYTES = 4
ANSWER_BYTES = _ANSWER.size + _CHECK_BYTES
_ANSWER_MAGIC = b"STRNANS1"
ID_BYTES = 16
_ANSWER_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_RECORD_LIMIT = 4096


class Outcome(IntEnum):
    """What a destination did with a migration. UNKNOWN is no record: this process never saw it."""

    UNKNOWN = 0
    PENDING = 1
    COMMITTED = 2
    RUNNING = 3
    ABANDONED = 4


class OutcomeRecord:
    """The destination's decisions, one per migration id, each made once.

    ::

        pending -> committed -> running
           |           |
           +-----------+-> abandoned
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._outcomes: dict[bytes, tuple[Outcome, int]] = {}

    def begin(self, migration_id: bytes) -> bool:
        """A stream names its id. False when that id was seen before: an id is good for one attempt."""
        with self._changed:
            if migration_id in self._outcomes:
                return False
            self._outcomes[migration_id] = (Outcome.PENDING, 0)
            if len(self._outcomes) > _RECORD_LIMIT:
                # The oldest is abandoned, for nothing follows a guest that runs. Forgotten means the same to
                # a source.
                del self._outcomes[next(iter(self._outcomes))]
            return True

    def commit(self, migration_id: bytes) -> bool:
        """COMMIT arrived. False when the migration was abandoned before."""
        return self._move(migration_id, (Outcome.PENDING,), Outcome.COMMITTED)

    def running(self, migration_id: bytes, clock_ns: int) -> None:
        """The guest of a committed migration runs."""
        moved = self._move(migration_id, (Outcome.COMMITTED,), Outcome.RUNNING, clock_ns)
        assert moved, "a guest was started without COMMIT"

    def abandon(self, migration_id: bytes) -> Outcome:
        """The guest will not run here under this id, unless it does already.

        :return: ABANDONED or RUNNING
        """
        self._move(migration_id, (Outcome.PENDING, Outcome.COMMITTED), Outcome.ABANDONED)
        return self._outcomes[migration_id][0]

    def ask(self, migration_id: bytes) -> tuple[Outcome, int]:
        """The source asks: a pending migration is abandoned, a committed one is waited for.

        :return: UNKNOWN, RUNNING or ABANDONED, and the clock before the first guest instruction
        """
        with self._changed:
            if migration_id not in self._outcomes:
                return Outcome.UNKNOWN, 0
            if self._outcomes[migration_id][0] is Outcome.PENDING:
                self._outcomes[migration_id] = (Outcome.ABANDONED, 0)
                self._changed.notify_all()
            # Starting a guest takes no peer, so this wait ends.
            self._changed.wait_for(lambda: self._outcomes[migration_id][0] is not Outcome.COMMITTED)
            return self._outcomes[migration_id]

    def _move(self, migration_id: bytes, before: tuple[Outcome, ...], to: Outcome, clock_ns: int = 0) -> bool:
        with self._changed:
            if self._outcomes.get(migration_id, (Outcome.UNKNOWN, 0))[0] not in before:
                return False
            self._outcomes[migration_id] = (to, clock_ns)
            self._changed.notify_all()
            return True


def answer(channel: Channel, record: OutcomeRecord, migration_id: bytes) -> None:
    """Answer a question that was read from a fresh connection."""
    outcome, clock_ns = record.ask(migration_id)
    data = _ANSWER.pack(_ANSWER_MAGIC, outcome, clock_ns)
    channel.send(data + xxhash.xxh32_digest(data))


def ask(
    uri: ListeningUri, migration_id: bytes, timeout_seconds: float, cancellation: Cancellation
) -> tuple[Outcome, int]:
    """Ask the destination until it answers.

    :return: UNKNOWN, RUNNING or ABANDONED, and the clock; a refused connection is UNKNOWN: the process is
        gone
    :raise InDoubt: When nobody answers in time.
    :raise Cancelled: When `cancellation` is set.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        left = max(0.1, deadline - time.monotonic())
        try:
            return _ask_once(uri, migration_id, min(_ANSWER_SECONDS, left), cancellation)
        except ConnectionRefused:
            return Outcome.UNKNOWN, 0
        except ChannelError as error:
            reason = str(error)
        if time.monotonic() + _RETRY_SECONDS >= deadline:
            raise InDoubt(reason)
        cancellation.sleep(_RETRY_SECONDS)


def _ask_once(
    uri: ListeningUri, migration_id: bytes, seconds: float, cancellation: Cancellation
) -> tuple[Outcome, int]:
    with uri.connect(cancellation, seconds) as channel:
        channel.send(QUESTION + migration_id)
        data = bytearray(ANSWER_BYTES)
        view, got = memoryview(data), 0
        while got < len(data):
            if not channel.wait_readable(seconds):
                raise ChannelError(f"no answer from {uri} in {seconds:.1f} s")
            more = channel.readinto(view[got:])
            if not more:
                raise ChannelError(f"{uri} closed the connection without an answer")
            got += more
    return decode_answer(bytes(data), str(uri))


def decode_answer(data: bytes, peer: str) -> tuple[Outcome, int]:
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
        or outcome not in (Outcome.UNKNOWN, Outcome.RUNNING, Outcome.ABANDONED)
    ):
        raise ChannelError(f"{peer} does not answer as a sterna does")
    return Outcome(outcome), int(clock_ns)
