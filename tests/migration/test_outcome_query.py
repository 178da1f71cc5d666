"""Who runs the guest: the destination's record, and the question on the wire."""

import json
import struct
import threading

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tests.migration.pairs import TCP, hosts, source_guest, waiting_guest
from tests.ports import held_port

from sterna.migration import handshake, outcome_query
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.errors import Cancelled, ChannelError, InDoubt, ProtocolError, Refused
from sterna.migration.handshake import Commit, Hello, Nack, Offer, Running
from sterna.migration.outcome_query import OutcomeRecord
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import AttemptOutcome, Event

ID = bytes(range(16))
PROCESS = {"boot": "", "namespace": 1, "pid": 1, "start": 1, "fd": 1, "token": ""}


def test_each_id_is_decided_once() -> None:
    record = OutcomeRecord()
    assert record.ask(ID) == (AttemptOutcome.UNKNOWN, 0)
    assert record.begin(ID)
    assert not record.begin(ID), "an id is good for one attempt"
    assert record.commit(ID)
    assert not record.commit(ID)
    record.running(ID, 99)
    assert record.ask(ID) == (AttemptOutcome.RUNNING, 99)
    assert record.give_up(ID) is AttemptOutcome.RUNNING
    assert record.confirms(ID)


def test_what_is_committed_is_not_given_up_for_a_lost_connection() -> None:
    record = OutcomeRecord()
    record.begin(ID)
    record.commit(ID)
    assert record.give_up(ID) is AttemptOutcome.COMMITTED
    assert not record.confirms(ID)
    record.start_failed(ID)
    assert record.ask(ID) == (AttemptOutcome.ABANDONED, 0)


def test_a_question_before_commit_abandons_for_ever() -> None:
    record = OutcomeRecord()
    record.begin(ID)
    assert record.ask(ID) == (AttemptOutcome.ABANDONED, 0)
    assert not record.commit(ID), "a COMMIT that comes later starts nothing"


def test_whoever_ends_takes_no_commit() -> None:
    """It had all that was sent, and COMMIT is on its way."""
    record = OutcomeRecord()
    started = bytes(16)
    for migration_id in (started, ID):
        record.begin(migration_id)
    record.commit(started)
    record.end()
    assert not record.commit(ID)
    assert record.ask(ID) == (AttemptOutcome.ABANDONED, 0)
    record.running(started, 3)
    assert record.ask(started) == (AttemptOutcome.RUNNING, 3), "what came before is here"
    with pytest.raises(Refused, match="it is ending"):
        record.begin(b"another id 16 by")


def test_the_record_does_not_grow_without_bound() -> None:
    record = OutcomeRecord()
    for number in range(10_000):
        migration_id = number.to_bytes(16, "big")
        assert record.begin(migration_id)
        if number != 1:
            record.give_up(migration_id)
    assert record.ask((0).to_bytes(16, "big"))[0] is AttemptOutcome.UNKNOWN
    assert record.ask((1).to_bytes(16, "big"))[0] is not AttemptOutcome.UNKNOWN, (
        "only what never ran is forgotten"
    )
    assert record.ask((9_999).to_bytes(16, "big"))[0] is AttemptOutcome.ABANDONED


@pytest.mark.parametrize("runs", [True, False])
def test_a_question_during_the_start_waits_for_it(runs: bool) -> None:
    record = OutcomeRecord()
    record.begin(ID)
    record.commit(ID)
    answers: list[tuple[AttemptOutcome, int]] = []
    thread = threading.Thread(target=lambda: answers.append(record.ask(ID)))
    thread.start()
    if runs:
        record.running(ID, 5)
    else:
        record.start_failed(ID)
    thread.join(300)
    assert answers == [(AttemptOutcome.RUNNING, 5) if runs else (AttemptOutcome.ABANDONED, 0)]


@pytest.mark.parametrize("ordered", range(20))
def test_commit_and_question_race_to_one_decision(ordered: int) -> None:
    record = OutcomeRecord()
    record.begin(ID)
    barrier = threading.Barrier(2)
    committed: list[bool] = []

    def commit() -> None:
        barrier.wait()
        committed.append(record.commit(ID))
        if committed[0]:
            record.running(ID, 7)

    thread = threading.Thread(target=commit)
    thread.start()
    barrier.wait()
    outcome, _ = record.ask(ID)
    thread.join()
    assert committed == [outcome is AttemptOutcome.RUNNING]


def never(event: Event) -> bool:
    return False


def test_nobody_at_the_address_tells_nothing() -> None:
    events: list[Event] = []
    with Cancellation() as cancellation, held_port() as port:
        uri = uris.parse(f"tcp:127.0.0.1:{port}")
        assert isinstance(uri, uris.ListeningUri)
        with pytest.raises(InDoubt, match="connection refused"):
            outcome_query.ask(uri, ID, 0.5, cancellation, lambda event: bool(events.append(event)))
    assert set(events) == {Event.CONNECTION_REFUSED, Event.DEADLINE}


@pytest.mark.parametrize(
    "outcome", [AttemptOutcome.UNKNOWN, AttemptOutcome.RUNNING, AttemptOutcome.ABANDONED]
)
def test_an_answer_is_heard(outcome: AttemptOutcome) -> None:
    record = OutcomeRecord()
    if outcome is not AttemptOutcome.UNKNOWN:
        record.begin(ID)
    if outcome is AttemptOutcome.RUNNING:
        record.commit(ID)
        record.running(ID, 77)
    with Cancellation() as cancellation, uris.parse("tcp::0").listen() as listener:

        def serve() -> None:
            with listener.accept(cancellation, cancellation) as channel:
                head = bytearray(64)
                size = channel.readinto(head)
                assert bytes(head[:size]) == outcome_query.QUESTION + ID
                outcome_query.answer(channel, record, ID)

        thread = threading.Thread(target=serve)
        thread.start()
        told = outcome_query.ask(uris.parse(listener.uri), ID, 20, cancellation, lambda event: True)
        thread.join(300)
    expected = {
        AttemptOutcome.UNKNOWN: (Event.UNKNOWN, 0),
        AttemptOutcome.RUNNING: (Event.RUNS, 77),
        AttemptOutcome.ABANDONED: (Event.ABANDONED, 0),
    }
    assert told == expected[outcome]


def test_silence_and_nonsense_leave_the_doubt(monkeypatch: pytest.MonkeyPatch) -> None:
    with Cancellation() as cancellation, uris.parse("tcp::0").listen() as listener:
        uri = uris.parse(listener.uri)
        with pytest.raises(InDoubt, match=r"no answer from .* in 0\.\d s"):
            outcome_query.ask(uri, ID, 0.2, cancellation, never)

        def babble() -> None:
            listener.accept(cancellation, cancellation).close()
            with listener.accept(cancellation, cancellation) as channel:
                channel.readinto(memoryview(bytearray(100)))
                channel.send(b"HTTP/1.1 400 Bad Request\r\n")
                channel.drain()

        thread = threading.Thread(target=babble)
        thread.start()
        for limit in ("_ANSWER_SECONDS", "_RETRY_SECONDS"):  # it is asked once, however long that takes
            monkeypatch.setattr(outcome_query, limit, 300.0)
        with pytest.raises(InDoubt, match="does not answer as a sterna does"):
            outcome_query.ask(uri, ID, 300, cancellation, never)
        thread.join(300)
        cancellation.set()
        with pytest.raises(Cancelled):
            outcome_query.ask(uri, ID, 5, cancellation, never)


@given(st.binary(max_size=200))
def test_garbage_is_no_message(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="from the peer"):
        handshake.decode(data, Commit)


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_flip_of_a_message_is_noticed(at: int, bit: int) -> None:
    data = bytearray(handshake.encode(Nack("no room", "ram", 3, bytes(range(64)))))
    data[at % len(data)] ^= 1 << bit
    with pytest.raises(ProtocolError):
        handshake.decode(bytes(data), Nack)


@pytest.mark.parametrize("number", [-(1 << 63) - 1, 1 << 63, 10**40, 10**400])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Hello, {"version": 1, "features": [], "incoming_id": "", "clock_ns": None}),
        (Offer, {"migration_id": "", "verify": True, "multifd": None}),
        (Nack, {"reason": "", "chunk": None}),
        (Commit, {"stop_ns": None, "clock_offset_ns": 0}),
        (Commit, {"stop_ns": 0, "clock_offset_ns": None}),
        (Running, {"clock_ns": None}),
        (Offer, {"migration_id": "", "verify": True, "process": PROCESS | {"pid": None}}),
        (Offer, {"migration_id": "", "verify": True, "process": PROCESS | {"start": None}}),
    ],
)
def test_a_number_that_no_peer_can_mean_is_refused_where_it_arrives(
    kind: type, message: dict[str, object], number: int
) -> None:
    data = json.dumps(message).replace("null", str(number)).encode()
    with pytest.raises(ProtocolError, match=f"malformed {kind.__name__} message from the peer"):
        handshake.decode(data + xxhash.xxh32_digest(data), kind)
    good = json.dumps(message).replace("null", "5").encode()
    assert isinstance(handshake.decode(good + xxhash.xxh32_digest(good), kind), kind)


@pytest.mark.parametrize("number", [-1, 1 << 64, 10**400])
def test_what_a_host_has_is_a_number_of_64_bits(number: int) -> None:
    hello = Hello(1, [], "", 1, {"register": (1 << 64) - 1})
    assert handshake.decode(handshake.encode(hello), Hello) == hello
    data = handshake.encode(hello)[:-4].replace(str((1 << 64) - 1).encode(), str(number).encode())
    with pytest.raises(ProtocolError, match="malformed Hello message from the peer"):
        handshake.decode(data + xxhash.xxh32_digest(data), Hello)


def test_a_commit_that_cannot_be_starts_no_guest(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = handshake.encode
    data = b'{"stop_ns":-1%s,"clock_offset_ns":0}' % (b"0" * 400)
    monkeypatch.setattr(
        handshake,
        "encode",
        lambda payload: data + xxhash.xxh32_digest(data) if isinstance(payload, Commit) else encode(payload),
    )
    with hosts(source_guest(16), waiting_guest(16)) as (here, there):
        here.controller.set_parameters({"x-sterna-doubt-timeout": 300})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.FAILED
        assert not info.in_doubt
        assert here.guest.running
        assert not there.guest.running


def test_a_clock_of_another_age_is_no_answer() -> None:
    def said(clock_ns: int) -> bytes:
        body = struct.pack(">8sBQ", b"STRNANS1", AttemptOutcome.RUNNING, clock_ns)
        return body + xxhash.xxh32_digest(body)

    assert outcome_query.decode_answer(said((1 << 62) - 1), "it") == (AttemptOutcome.RUNNING, (1 << 62) - 1)
    with pytest.raises(ChannelError, match="does not answer as a sterna does"):
        outcome_query.decode_answer(said(1 << 62), "it")


def test_clocks_that_disagree_are_corrected_or_clamped() -> None:
    assert handshake.clock_offset(1000, 1200, 1190) == 0, "within the round trip there is nothing to correct"
    assert handshake.clock_offset(1000, 1200, 51_100) == 50_000
    assert handshake.clamp_elapsed(5, 10) == (5, "")
    elapsed, note = handshake.clamp_elapsed(-3_000_000, 10)
    assert elapsed == 0
    assert "-3.000 ms; took 0" in note
    elapsed, note = handshake.clamp_elapsed(90_000_000, 50_000_000)
    assert elapsed == 50_000_000
    assert "took that" in note
