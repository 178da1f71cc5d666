"""What the proxy says of a migration's end: never more than it has seen."""

import pytest
from tests.analysis.test_survey import END, HEADER, records
from tests.stream.streams import PieceSource

from sterna.analysis.proxy.answers import Answers
from sterna.analysis.proxy.outcome import ProxyOutcome, judge
from sterna.analysis.survey import survey
from sterna.migration.handshake import PrivateCommand
from sterna.ownership import AttemptOutcome
from sterna.stream import sections
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.return_path import shut
from sterna.stream.wire import Command

RETURN_PATH = sections.command(Command.OPEN_RETURN_PATH)
OFFER = RETURN_PATH + sections.command(PrivateCommand.OFFER, b"{}")
COMMIT = sections.command(PrivateCommand.COMMIT, b"{}")
RAM = (
    sections.section_start(2, "ram", 0, 4)
    + ram_setup([("toy.ram", 4096)])
    + sections.footer(2)
    + sections.section_end(2)
    + records("0")
    + END_OF_RECORDS
    + sections.footer(2)
)
JUNK = b"\x7f"
"""No part of a stream begins so."""

STREAMS = {
    "cut": (HEADER + RAM, ProxyOutcome.FAILED, ProxyOutcome.CANCELLED),
    "cut in a section": (HEADER + RAM[:-100], ProxyOutcome.FAILED, ProxyOutcome.CANCELLED),
    "cut, offered": (HEADER + OFFER + RAM, ProxyOutcome.FAILED, ProxyOutcome.CANCELLED),
    "unreadable": (HEADER + RAM + JUNK + END, ProxyOutcome.UNKNOWN, ProxyOutcome.UNKNOWN),
    "unreadable behind its end": (
        HEADER + OFFER + RAM + END + JUNK,
        ProxyOutcome.UNKNOWN,
        ProxyOutcome.UNKNOWN,
    ),
    "whole": (HEADER + RAM + END, ProxyOutcome.UNCONFIRMED, ProxyOutcome.UNCONFIRMED),
    "whole but for its description": (
        HEADER + RAM + END[:-1],
        ProxyOutcome.UNCONFIRMED,
        ProxyOutcome.UNCONFIRMED,
    ),
    "whole, with a return path": (
        HEADER + RETURN_PATH + RAM + END,
        ProxyOutcome.IN_DOUBT,
        ProxyOutcome.IN_DOUBT,
    ),
    "whole, offered": (HEADER + OFFER + RAM + END, ProxyOutcome.FAILED, ProxyOutcome.FAILED),
    "committed": (HEADER + OFFER + RAM + END + COMMIT, ProxyOutcome.IN_DOUBT, ProxyOutcome.IN_DOUBT),
    "not looked at": (None, ProxyOutcome.UNKNOWN, ProxyOutcome.UNKNOWN),
}


def outcome(
    stream: bytes | None, answers: Answers, *, interrupted: bool, answer: AttemptOutcome | None = None
) -> ProxyOutcome:
    found = None if stream is None else survey(PieceSource(stream))
    return judge(
        found, answers, "it ended", closed_first=False, interrupted=interrupted, answer=answer
    ).outcome


@pytest.mark.parametrize("kind", STREAMS)
def test_without_an_answer(kind: str) -> None:
    """To interrupt the proxy does not keep a destination from running what it has: only a stream that was cut shows that."""
    stream, left_alone, interrupted = STREAMS[kind]
    assert outcome(stream, Answers(), interrupted=False) is left_alone
    assert outcome(stream, Answers(), interrupted=True) is interrupted


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("kind", STREAMS)
def test_the_destinations_word_counts_whatever_was_seen(kind: str, interrupted: bool) -> None:
    stream = STREAMS[kind][0]
    for status, expected in ((0, ProxyOutcome.COMPLETED), (1, ProxyOutcome.FAILED)):
        answers = Answers()
        answers.feed(memoryview(shut(status).encode()))
        if kind != "committed" or status:
            assert outcome(stream, answers, interrupted=interrupted) is expected
    if kind == "committed":
        for answer, expected in (
            (AttemptOutcome.RUNNING, ProxyOutcome.COMPLETED),
            (AttemptOutcome.ABANDONED, ProxyOutcome.FAILED),
        ):
            assert outcome(stream, Answers(), interrupted=interrupted, answer=answer) is expected
