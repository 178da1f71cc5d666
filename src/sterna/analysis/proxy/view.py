"""What a proxy has seen, as plain data."""

from dataclasses import dataclass

from sterna.analysis.findings import StreamSurvey
from sterna.analysis.proxy.answers import Answers
from sterna.analysis.proxy.connection import ConnectionKind
from sterna.analysis.proxy.outcome import ProxyVerdict


@dataclass(frozen=True)
class ConnectionView:
    """A connection, by what went through.

    :ivar forwarded: bytes to the destination
    :ivar returned: bytes to the source
    :ivar count: how many connections these figures are of
    """

    kind: ConnectionKind
    forwarded: int
    returned: int
    count: int = 1


@dataclass(frozen=True)
class ProxyView:
    """What the proxy has seen so far.

    :ivar survey: of the main stream, a moment old; with digests when all of it went through
    :ivar analysis_fault: why there is no survey, or not of everything
    :ivar answers: what came back on the main connection
    :ivar seconds: from the first connection until now, or the end
    :ivar pass_starts: for each pass of the survey, seconds from the first connection
    :ivar confirmed_seconds: from the last byte of the stream to the destination's answer
    :ivar stalled_seconds: how long forwarding waited for analysis or recording
    :ivar turned_away: connections that were refused because there were too many
    :ivar waiting: what the proxy waits for once all has gone through; empty before, and in the end
    """

    verdict: ProxyVerdict
    survey: StreamSurvey | None
    analysis_fault: str
    answers: Answers
    connections: tuple[ConnectionView, ...]
    seconds: float
    pass_starts: tuple[float, ...]
    confirmed_seconds: float | None
    stalled_seconds: float
    recording_fault: str
    turned_away: int = 0
    waiting: str = ""

    @property
    def forwarded(self) -> int:
        return sum(connection.forwarded for connection in self.connections)
