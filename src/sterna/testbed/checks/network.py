"""A guest is reached over the network through its migrations."""

import itertools
from collections.abc import Iterator, Sequence
from typing import ClassVar

from sterna.testbed.checks.finding import BaseCheck, Finding
from sterna.testbed.evidence import Evidence, MigrationRecord, Ping, Reachability
from sterna.testbed.settings import Milliseconds, Seconds

_NOBODY = "no guest was reached over the network"


class PingCheck(BaseCheck, tag="ping", frozen=True):
    """Pings are lost in one go at most for each migration, while the guest moves; none is answered twice, and the guest has
    answered all whose answers came.

    :ivar slack_s: how long after the route has followed the guest a ping may still be lost
    """

    slack_s: Seconds = 1.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = (
        "ping goes on across the L3 route switch: none is lost but then, none answered twice"
    )

    def judge(self, evidence: Evidence) -> Finding:
        problems: list[str] = []
        sent = lost = twice = 0
        for reached in evidence.reachability:
            if not reached.pings:
                problems.append(f"{reached.guest}: no ping was sent")
                continue
            sent += len(reached.pings)
            lost += sum(not ping.answers for ping in reached.pings)
            twice += sum(ping.answers > 1 for ping in reached.pings)
            problems += self._judge(reached)
        if not evidence.reachability:
            return self.skipped(_NOBODY)
        figure = f"{lost} of {sent} pings lost, {twice} answered twice"
        return self.found(figure, problems, {"sent": sent, "lost": lost, "twice": twice})

    def _judge(self, reached: Reachability) -> Iterator[str]:
        moves = [record for record in reached.passages if record.completed]
        for number, (first, last) in enumerate(_losses(reached.pings), 1):
            which = f"{reached.guest}: pings {first.number} to {last.number} are lost"
            during = any(
                record.began <= first.sent and last.sent <= switched + self.slack_s
                for record, switched in zip(moves, reached.switched, strict=False)
            )
            if not during:
                yield f"{which}, and the guest was not moving then"
            elif number > len(moves):
                yield f"{which}, after others that were: {len(moves)} migrations account for as many losses"
        for ping in reached.pings:
            if ping.answers > 1:
                yield f"{reached.guest}: ping {ping.number} is answered {ping.answers} times"
        counted = reached.answered_by_guest.get("icmp")
        answers = sum(ping.answers for ping in reached.pings)
        if counted is not None and not answers <= counted <= len(reached.pings):
            yield (
                f"{reached.guest}: it says that it answered {counted} pings; {len(reached.pings)} were sent and {answers} "
                f"answers came"
            )


class SilenceCheck(BaseCheck, tag="silence", frozen=True):
    """The guest is silent no longer than its downtime, and what the network and this machine add.

    :ivar slack_ms: what may be added, beyond the longest silence before the migration
    """

    slack_ms: Milliseconds = 100.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "the guest is silent for its downtime and no longer"

    def judge(self, evidence: Evidence) -> Finding:
        problems, worst = [], {"silence_ms": -1.0, "downtime_ms": 0.0, "before_ms": 0.0}
        for reached in evidence.reachability:
            before = _silence(
                reached.pings, 0.0, min((record.began for record in reached.passages), default=0.0)
            )
            for record, switched in zip(reached.passages, reached.switched, strict=False):
                silence = _silence(reached.pings, record.began, _after(reached.pings, record, switched))
                allowed = record.downtime_ms + before + self.slack_ms
                if silence > allowed:
                    problems.append(
                        f"{reached.guest}: silent for {silence:.0f} ms; {allowed:.0f} ms is the most with a downtime of "
                        f"{record.downtime_ms:.1f} ms"
                    )
                if silence > worst["silence_ms"]:
                    worst = {
                        "silence_ms": silence,
                        "downtime_ms": record.downtime_ms,
                        "before_ms": before,
                    }
        if worst["silence_ms"] < 0:
            return self.skipped("no guest was reached over the network through a migration")
        figure = (
            f"silent for {worst['silence_ms']:.0f} ms at most, downtime {worst['downtime_ms']:.1f} ms; "
            f"{worst['before_ms']:.0f} ms at most before"
        )
        return self.found(figure, problems, worst)


class SessionCheck(BaseCheck, tag="session", frozen=True):
    """A session that was opened before the migration goes on after it: over the same socket, every request is answered with
    what was sent, and the guest has seen every number.
    """

    claim: ClassVar[str] = "a session opened before the migration goes on after it, and nothing of it is lost"

    def judge(self, evidence: Evidence) -> Finding:
        problems: list[str] = []
        exchanges = repeated = after = 0
        for reached in evidence.reachability:
            done = [exchange for exchange in reached.session if exchange.answered is not None]
            exchanges += len(done)
            repeated += sum(exchange.attempts - 1 for exchange in done)
            problems += self._judge(reached)
            last = max(reached.switched, default=None)
            late = [exchange for exchange in done if last is not None and exchange.sent > last]
            after += len(late)
            if last is not None and not late:
                problems.append(f"{reached.guest}: the session does not go on after the migration")
        if not evidence.reachability:
            return self.skipped(_NOBODY)
        figure = f"{exchanges} requests answered, {after} of them after the migration; {repeated} repeated"
        values = {"answered": exchanges, "after": after, "repeated": repeated}
        return self.found(figure, problems, values)

    def _judge(self, reached: Reachability) -> Iterator[str]:
        for exchange in reached.session[:-1]:
            if exchange.answered is None:
                yield f"{reached.guest}: request {exchange.number} is not answered"
        for exchange in reached.session:
            if exchange.strange:
                yield f"{reached.guest}: {exchange.strange} answers to request {exchange.number} are not what was sent"
        if lost := reached.answered_by_guest.get("lost"):
            yield f"{reached.guest}: it has not seen {lost} of the session's numbers"
        counted = reached.answered_by_guest.get("udp")
        done = sum(exchange.answered is not None for exchange in reached.session)
        if counted is not None and counted < done:
            yield f"{reached.guest}: it says that it answered {counted} requests, and {done} answers came"


class ConversationCheck(BaseCheck, tag="ssh-session", frozen=True):
    """The session that was opened before the migration answers after it, and every answer was the right one.

    :ivar silence_ms: the longest that it may take to answer; TCP sends again after some hundred ms, and then ever later
    """

    silence_ms: Milliseconds = 5000.0
    timed: ClassVar[bool] = True
    claim: ClassVar[str] = "an ssh session that was opened before the migration goes on after it"

    def judge(self, evidence: Evidence) -> Finding:
        if not evidence.conversations:
            return self.skipped("no session was opened")
        problems = [problem for seen in evidence.conversations for problem in seen.problems]
        answers = sum(seen.answers for seen in evidence.conversations)
        silence = max(seen.silence_ms for seen in evidence.conversations)
        if silence > self.silence_ms:
            problems.append(f"it was silent for {silence:.0f} ms; {self.silence_ms:g} ms is the most")
        figure = f"{answers} answers, silent for {silence:.0f} ms at most"
        return self.found(figure, problems, {"answers": answers, "silence_ms": silence})


def _losses(pings: Sequence[Ping]) -> Iterator[tuple[Ping, Ping]]:
    """The first and last of each run of pings without an answer."""
    for answered, run in itertools.groupby(pings, key=lambda ping: ping.answers > 0):
        if not answered:
            members = list(run)
            yield members[0], members[-1]


def _silence(pings: Sequence[Ping], since: float, until: float) -> float:
    """The longest time between two answers that ends after `since` and begins before `until`, in ms."""
    times = sorted(ping.answered for ping in pings if ping.answered is not None)
    gaps = [
        later - earlier for earlier, later in itertools.pairwise(times) if later >= since and earlier <= until
    ]
    return max(gaps, default=0.0) * 1000


def _after(pings: Sequence[Ping], record: MigrationRecord, switched: float) -> float:
    """When the first ping that was sent after the switch was answered; or the switch."""
    times = (ping.answered for ping in pings if ping.answered is not None and ping.sent >= switched)
    return min(times, default=max(switched, record.ended))
