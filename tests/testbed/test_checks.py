"""Each check fails on what it is there to find, and says what was wrong."""

from dataclasses import replace
from typing import Any

import pytest

from sterna.host.load import HostLoad
from sterna.launch.console import Line
from sterna.testbed.checks import Check, CheckVerdict
from sterna.testbed.checks.clocks import ClocksCheck
from sterna.testbed.checks.console import ConsoleCheck
from sterna.testbed.checks.finding import BaseCheck
from sterna.testbed.checks.hugepages import HugePagesCheck, SpeedCheck
from sterna.testbed.checks.memory import AuditCheck, ContentCheck, DigestCheck, ReclaimedCheck
from sterna.testbed.checks.network import ConversationCheck, PingCheck, SessionCheck, SilenceCheck
from sterna.testbed.checks.outcome import CancelledCheck, CompletedCheck, DowntimeCheck, OneSideCheck
from sterna.testbed.evidence import (
    Blackout,
    CancelRecord,
    Conversation,
    Evidence,
    Exchange,
    FaultCase,
    HugePages,
    MigrationRecord,
    Ping,
    Reachability,
)
from sterna.testbed.runner import judge

DONE = {
    "status": "completed",
    "total-time": 2000,
    "downtime": 80,
    "ram": {"transferred": 1000, "dirty-sync-count": 3},
}
FAULT_CASE = FaultCase("cut", "setup", "failed", ["host1"], ["host1"], False, 10, [])
CANCELLED = CancelRecord(1.0, 0.5, 1000, "cancelled", 30.0, True, 3, 10)


def record(**changes: Any) -> MigrationRecord:
    return MigrationRecord("guest", "load", "host1", "host2", 0.0, **({"info": DONE} | changes))


LOST_WRITE = {"address": 0x40200000, "slot": 0, "sent-in-pass": 2, "found-after-pass": 4}


def audited(*lost: dict[str, int]) -> dict[str, Any]:
    """What query-migrate says of a migration that was audited."""
    told = {
        "harvests": 3,
        "pages-judged": 100,
        "longest-hold-ms": 1.5,
        "lost-pages": len(lost),
        "lost": [*lost],
    }
    return DONE | {"x-sterna": {"audit": told}}


def clock(*readings: tuple[int, int]) -> list[Line]:
    """Lines of the clock, from sequence number and milliseconds."""
    return [
        Line(
            f"clock: 00:00:{ms // 1000:02}.{ms % 1000:03} seq {sequence} largest gap 1 ms backward 0",
            ms / 1000,
        )
        for sequence, ms in readings
    ]


def console(*readings: tuple[int, int]) -> Evidence:
    return Evidence(passages=[record()], lines={"guest": clock(*readings)})


MOVED = replace(MigrationRecord("guest", "load", "host1", "host2", 1.0, info=DONE), ended=1.4)
LOST = {120, 121, 122, 123}
"""Pings while the guest moves, of one each 10 ms."""


def pings(lost: set[int] = LOST, twice: int = -1, late_s: float = 0.0) -> list[Ping]:
    return [
        Ping(
            number,
            number / 100,
            None if number in lost else number / 100 + 0.001 + (late_s if number > 123 else 0.0),
            (number not in lost) + (number == twice),
        )
        for number in range(200)
    ]


def session(*changes: Exchange, count: int = 20) -> list[Exchange]:
    changed = {exchange.number: exchange for exchange in changes}
    usual = [Exchange(number, number / 10, number / 10 + 0.002, 1, 0) for number in range(count)]
    return [changed.get(exchange.number, exchange) for exchange in usual]


def reached(**changes: Any) -> Evidence:
    usual: dict[str, Any] = {
        "pings": pings(),
        "session": session(Exchange(12, 1.2, 1.41, 2, 0)),
        "passages": [MOVED],
        "switched": [1.23],
        "answered_by_guest": {"icmp": 196, "udp": 21, "lost": 0},
    }
    return Evidence(reachability=[Reachability("guest", "10.83.9.1", **(usual | changes))])


CASES: list[tuple[BaseCheck, Evidence, Evidence, str]] = [
    (
        ConversationCheck(),
        Evidence(conversations=[Conversation(20, 900.0, [])]),
        Evidence(conversations=[Conversation(20, 9000.0, [])]),
        "silent for 9000 ms",
    ),
    (
        ConversationCheck(),
        Evidence(conversations=[Conversation(20, 900.0, [])]),
        Evidence(conversations=[Conversation(20, 900.0, ["it does not answer after the migration"])]),
        "does not answer",
    ),
    (
        CompletedCheck(),
        Evidence(passages=[record()]),
        Evidence(passages=[record(), record(info={"status": "failed", "error-desc": "no route"})]),
        "no route",
    ),
    (
        PingCheck(),
        reached(),
        reached(pings=pings(LOST | {50})),
        "pings 50 to 50 are lost, and the guest was not moving then",
    ),
    (
        PingCheck(),
        reached(),
        reached(pings=pings({*range(120, 199)}), switched=[1.23 - 0.5]),
        "pings 120 to 198 are lost, and the guest was not moving",
    ),
    (
        PingCheck(),
        reached(),
        reached(pings=pings(LOST | {126})),
        "pings 126 to 126 are lost, after others that were: 1 migrations",
    ),
    (PingCheck(), reached(), reached(pings=pings(twice=70)), "ping 70 is answered 2 times"),
    (PingCheck(), reached(), reached(pings=[]), "no ping was sent"),
    (
        PingCheck(),
        reached(answered_by_guest={}),
        reached(answered_by_guest={"icmp": 195}),
        "it says that it answered 195 pings; 200 were sent and 196 answers came",
    ),
    (
        SilenceCheck(slack_ms=20),
        reached(),
        reached(pings=pings(late_s=0.2)),
        "silent for 250 ms; 110 ms is the most with a downtime of 80.0 ms",
    ),
    (
        SessionCheck(),
        reached(),
        reached(session=session(Exchange(5, 0.5, None, 9, 0))),
        "request 5 is not answered",
    ),
    (
        SessionCheck(),
        reached(),
        reached(session=session(Exchange(5, 0.5, 0.6, 1, 1))),
        "1 answers to request 5 are not what was sent",
    ),
    (SessionCheck(), reached(), reached(session=session(count=12)), "the session does not go on"),
    (
        SessionCheck(),
        reached(),
        reached(answered_by_guest={"lost": 2}),
        "it has not seen 2 of the session's numbers",
    ),
    (
        SessionCheck(),
        reached(),
        reached(answered_by_guest={"udp": 19}),
        "it says that it answered 19 requests, and 20 answers came",
    ),
    (
        CompletedCheck(),
        Evidence(passages=[record()]),
        Evidence(passages=[record(problems=["it does not run"])]),
        "it does not run",
    ),
    (
        DowntimeCheck(limit_ms=100),
        Evidence(passages=[record()]),
        Evidence(passages=[record(info=DONE | {"downtime": 101})]),
        "101.0 ms",
    ),
    (
        ContentCheck(),
        Evidence(passages=[record(pages_checked=7)]),
        Evidence(passages=[record(pages_checked=7, content=["page 3 is stale"])]),
        "page 3",
    ),
    (
        AuditCheck(),
        Evidence(passages=[record(info=audited())]),
        Evidence(passages=[record(info=audited(LOST_WRITE))]),
        "page 0x40200000 (slot 0), sent in pass 2, was written and is not in the log after pass 4",
    ),
    (
        AuditCheck(),
        Evidence(passages=[record(chunks_forwarded=3)]),
        Evidence(passages=[record(chunks_forwarded=3, lost=["of the 512 pages at 0x40600000"])]),
        "0x40600000",
    ),
    (
        DigestCheck(),
        Evidence(passages=[record(chunks_compared=7)]),
        Evidence(passages=[record(chunks_compared=7, digest=["RAM at 0x40000000 differs"])]),
        "0x40000000",
    ),
    (
        ClocksCheck(slack_ms=20),
        Evidence(passages=[record(blackout=Blackout(90, 80, 95, 5))]),
        Evidence(passages=[record(blackout=Blackout(101, 80, 95, 5))]),
        "counter saw 101.0 ms",
    ),
    (
        ClocksCheck(slack_ms=20),
        Evidence(passages=[record(blackout=Blackout(100, 80, 106, 5), jitter_ms=2)]),
        Evidence(passages=[record(blackout=Blackout(0, 80, 80, 5), jitter_ms=2)]),
        "counter saw 0.0 ms",
    ),
    (
        ClocksCheck(slack_ms=20),
        Evidence(passages=[record(blackout=Blackout(80, 80, 104, 5))]),
        Evidence(passages=[record(blackout=Blackout(80, 80, 106, 5))]),
        "the observer saw 106.0 ms",
    ),
    (
        ClocksCheck(slack_ms=20, counter="stops"),
        Evidence(passages=[record(blackout=Blackout(22, 80, 80, 5), jitter_ms=2)]),
        Evidence(passages=[record(blackout=Blackout(23, 80, 80, 5), jitter_ms=2)]),
        "its counter, which is to stop with it, has gone on for 23.0 ms",
    ),
    (
        ConsoleCheck(period_ms=50, slack_ms=10),
        console((1, 0), (2, 50), (3, 190), (4, 240)),
        console((1, 0), (2, 50), (3, 191), (4, 240)),
        "line 3 is 141 ms after",
    ),
    (
        ConsoleCheck(period_ms=50, slack_ms=10),
        console((1, 0), (2, 50)),
        console((1, 0), (3, 50)),
        "line 3 comes after line 1",
    ),
    (
        ConsoleCheck(period_ms=50, slack_ms=10),
        console((1, 0), (2, 50)),
        console((1, 50), (2, 40)),
        "10 ms before",
    ),
    (
        ConsoleCheck(period_ms=50, slack_ms=10),
        console((1, 0), (2, 50)),
        Evidence(passages=[record()], lines={"guest": [*clock((1, 0)), Line("clock: 00:0clock: 00", 0.1)]}),
        "not a line",
    ),
    (
        HugePagesCheck(),
        Evidence(
            blocks_before=10,
            huge_pages=[HugePages(0, 10, 0), HugePages(1, 3, 9)],
            cancelled=[CANCELLED],
        ),
        Evidence(
            blocks_before=10, huge_pages=[HugePages(1, 3, 9)], cancelled=[replace(CANCELLED, blocks_after=9)]
        ),
        "9 of 10",
    ),
    (
        HugePagesCheck(),
        Evidence(blocks_before=10, huge_pages=[HugePages(1, 3, 9)], cancelled=[CANCELLED]),
        Evidence(blocks_before=10, huge_pages=[HugePages(1, 10, 9)], cancelled=[CANCELLED]),
        "none was dissolved",
    ),
    (SpeedCheck(), Evidence(speeds=[100, 95.1]), Evidence(speeds=[100, 94.9]), "5.1 % slower"),
    (
        CancelledCheck(limit_ms=100),
        Evidence(cancelled=[CANCELLED]),
        Evidence(cancelled=[replace(CANCELLED, runs=False)]),
        "does not run on",
    ),
    (
        CancelledCheck(limit_ms=100),
        Evidence(cancelled=[CANCELLED]),
        Evidence(cancelled=[replace(CANCELLED, ms=101)]),
        "101 ms",
    ),
    (
        CancelledCheck(),
        Evidence(cancelled=[CANCELLED]),
        Evidence(cancelled=[replace(CANCELLED, status="completed")]),
        "is completed",
    ),
    (
        OneSideCheck(),
        Evidence(injured=[FAULT_CASE]),
        Evidence(injured=[replace(FAULT_CASE, runs_at=["host1", "host2"])]),
        "runs on host1 and host2",
    ),
    (
        OneSideCheck(),
        Evidence(injured=[FAULT_CASE]),
        Evidence(injured=[replace(FAULT_CASE, runs_at=[])]),
        "runs nowhere",
    ),
    (
        OneSideCheck(),
        Evidence(injured=[replace(FAULT_CASE, runs_at=[], may_be_gone=True)]),
        Evidence(injured=[replace(FAULT_CASE, runs_at=["host2"], may_be_gone=True)]),
        "runs on host2",
    ),
    (
        OneSideCheck(),
        Evidence(injured=[FAULT_CASE]),
        Evidence(injured=[replace(FAULT_CASE, problems=["page 3 is stale"])]),
        "page 3 is stale",
    ),
    (
        ReclaimedCheck(),
        Evidence(reclaimed={"MiB swapped": 3}),
        Evidence(reclaimed={"MiB swapped": 0}),
        "MiB swapped: none",
    ),
]


@pytest.mark.parametrize(("check", "good", "bad", "told"), CASES)
def test_it_holds_and_it_fails(check: BaseCheck, good: Evidence, bad: Evidence, told: str) -> None:
    held = check.judge(good)
    assert held.verdict is CheckVerdict.PASSED, held
    assert held.figure
    assert held.values
    failed = check.judge(bad)
    assert failed.verdict is CheckVerdict.FAILED
    assert any(told in problem for problem in failed.problems), failed.problems


TIMED = (
    *(CancelledCheck, ClocksCheck, ConsoleCheck, ConversationCheck, DowntimeCheck, PingCheck),
    *(SilenceCheck, SpeedCheck),
)


@pytest.mark.parametrize("check", {type(check): check for check, *_ in CASES}.values())
def test_nothing_seen_is_nothing_passed(check: BaseCheck) -> None:
    finding = check.judge(Evidence())
    assert finding.verdict is CheckVerdict.SKIPPED
    assert finding.figure


def test_many_problems_are_counted() -> None:
    finding = ContentCheck().judge(Evidence(passages=[record(pages_checked=1, content=["x"] * 50)]))
    assert len(finding.problems) == 21
    assert finding.problems[-1] == "and 30 more"


@pytest.mark.parametrize(("check", "good", "bad", "told"), CASES)
def test_a_timing_that_fails_says_how_busy_the_host_was(
    check: Check, good: Evidence, bad: Evidence, told: str
) -> None:
    busy = HostLoad(2, 9.5, 0.75, 0.0, None)
    [held] = judge([check], replace(good, host=busy))
    assert not held.problems
    [failed] = judge([check], replace(bad, host=busy))
    said = [problem for problem in failed.problems if problem == str(busy)]
    assert said == ([str(busy)] if isinstance(check, TIMED) else [])
    assert judge([check], bad) == [check.judge(bad)]
