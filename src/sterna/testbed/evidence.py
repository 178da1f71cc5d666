"""What a scenario's procedure saw, as plain data: the checks judge it, and reports draw it.

Times named `at` are seconds of CLOCK_MONOTONIC since the procedure began.
"""

from dataclasses import dataclass, field
from typing import Any

from sterna.host.load import HostLoad
from sterna.launch.console import Line


@dataclass(frozen=True)
class ProgressSample:
    """A migration under way, as query-migrate shows it once.

    :ivar transferred: bytes of the stream so far
    :ivar remaining: bytes of RAM still to send
    :ivar mbps: as query-migrate tells
    """

    at: float
    status: str
    pass_number: int
    transferred: int
    remaining: int
    dirty_pages_rate: int
    mbps: float


@dataclass(frozen=True)
class Blackout:
    """How long a guest stood still in its migration (the blackout), by three clocks, in ms.

    :ivar guest: by the guest's own counter
    :ivar vmm: the downtime that the source reports
    :ivar observer: from the last sign of life at the source to the first at the destination, seen from outside
    :ivar resolution: how far apart the observer's samples were at those two points, together
    """

    guest: float
    vmm: float
    observer: float | None = None
    resolution: float = 0.0


@dataclass(frozen=True)
class HeatMapRecord:
    """How often the pages of a RAM block were sent, in cells of neighbouring pages.

    :ivar sent: times that pages of each cell were sent, all together
    :ivar most: times that its most sent page was
    """

    block: str
    pages: int
    pages_per_cell: int
    sent: list[int]
    most: list[int]


@dataclass
class MigrationRecord:
    """One migration of one guest.

    :ivar load: what the guest did, for people
    :ivar jitter_ms: the longest that the guest stood still before, with no migration: what this machine is good for
    :ivar info: the last answer of query-migrate at the source
    :ivar heat: which pages were sent how often, where the VM tells
    :ivar blackout: None when it did not complete
    :ivar guest_exact: whether the guest's counter told the gap itself, not an upper bound
    :ivar pages_checked: work pages whose content was compared with what the program must have written; None: not looked at
    :ivar content: what was wrong with them
    :ivar chunks_compared: 2 MiB pieces of RAM digested at both ends while no guest ran
    :ivar digest: those that differ
    :ivar chunks_forwarded: 2 MiB pieces of the source's RAM compared with what was forwarded of them
    :ivar lost: those that differ
    """

    guest: str
    load: str
    source: str
    destination: str
    began: float
    ended: float = 0.0
    jitter_ms: float = 0.0
    info: dict[str, Any] = field(default_factory=dict)
    moments: list[ProgressSample] = field(default_factory=list)
    heat: list[HeatMapRecord] = field(default_factory=list)
    blackout: Blackout | None = None
    guest_exact: bool = True
    pages_checked: int | None = None
    content: list[str] = field(default_factory=list)
    chunks_compared: int = 0
    digest: list[str] = field(default_factory=list)
    chunks_forwarded: int = 0
    lost: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def completed(self) -> bool:
        return self.info.get("status") == "completed"

    @property
    def total_ms(self) -> float:
        return float(self.info.get("x-sterna", {}).get("total-ms", self.info.get("total-time", 0)))

    @property
    def downtime_ms(self) -> float:
        return float(self.info.get("x-sterna", {}).get("downtime-ms", self.info.get("downtime", 0)))

    @property
    def pass_count(self) -> int:
        return int(self.info.get("ram", {}).get("dirty-sync-count", 0))

    @property
    def transferred(self) -> int:
        """Bytes of the stream."""
        return int(self.info.get("ram", {}).get("transferred", 0))


@dataclass(frozen=True)
class HugePages:
    """One sample of stage 2: how much of guest RAM is mapped in huge pages."""

    at: float
    blocks: int
    pages: int


@dataclass(frozen=True)
class CancelRecord:
    """One migration that was cancelled.

    :ivar at: when
    :ivar point: how far it was to come, as a part of the guest's RAM in use
    :ivar transferred: how far it had come, in bytes
    :ivar status: its outcome
    :ivar ms: from the command to the outcome
    :ivar runs: whether the guest runs on
    :ivar least_blocks: fewest huge pages counted during it
    :ivar blocks_after: huge pages once the guest had written all its pages again
    """

    at: float
    point: float
    transferred: int
    status: str
    ms: float
    runs: bool
    least_blocks: int | None
    blocks_after: int | None


@dataclass(frozen=True)
class FaultCase:
    """One migration that something was done to.

    :ivar fault: what
    :ivar phase: when
    :ivar status: the outcome at the source, or how it ended
    :ivar runs_at: hosts where the guest runs in the end
    :ivar allowed: hosts of which one may run it
    :ivar may_be_gone: the guest had no other host than the one that was lost
    :ivar pages_checked: pages of its RAM that were compared afterwards
    :ivar problems: what was wrong
    """

    fault: str
    phase: str
    status: str
    runs_at: list[str]
    allowed: list[str]
    may_be_gone: bool
    pages_checked: int
    problems: list[str]
    note: str = ""


@dataclass
class Ping:
    """An ICMP echo request.

    :ivar number: counted from 0
    :ivar answered: when its first answer came; None: never
    :ivar answers: how many came
    """

    number: int
    sent: float
    answered: float | None = None
    answers: int = 0


@dataclass(frozen=True)
class Exchange:
    """One request of a session over UDP, and its answer.

    :ivar number: counted from 0
    :ivar sent: for the first time
    :ivar answered: None: the session ended before
    :ivar attempts: how often it was sent
    :ivar strange: answers that were not what was sent
    """

    number: int
    sent: float
    answered: float | None
    attempts: int
    strange: int


@dataclass
class Reachability:
    """A guest as the server reached it over the network, through all its migrations.

    :ivar pings: at a steady pace
    :ivar session: over one socket
    :ivar passages: the migrations meanwhile (`passages` is their key in JSON)
    :ivar switched: when the router's route followed the guest, for each migration that completed
    :ivar answered_by_guest: how many requests the guest says it answered, by protocol (`icmp`, `udp`), and what it missed
        of the session (`lost`); empty when it does not count
    """

    guest: str
    address: str
    pings: list[Ping] = field(default_factory=list)
    session: list[Exchange] = field(default_factory=list)
    passages: list[MigrationRecord] = field(default_factory=list)
    switched: list[float] = field(default_factory=list)
    answered_by_guest: dict[str, int] = field(default_factory=dict)


@dataclass
class Conversation:
    """A session over ssh.

    :ivar answers: how many questions it answered
    :ivar silence_ms: the longest time between two answers
    :ivar problems: what was wrong
    """

    answers: int = 0
    silence_ms: float = 0.0
    problems: list[str] = field(default_factory=list)


@dataclass
class Evidence:
    """Everything of one run of one scenario.

    :ivar passages: the migrations, in the order they began
    :ivar lines: the console of each guest, by its name, across its hosts
    :ivar huge_pages: over time
    :ivar blocks_before: huge pages when the guest had settled, before anything was done to it
    :ivar speeds: work of the guest per second of its CPUs' time: before, and after
    :ivar reachability: of each guest that was reached over the network
    :ivar conversations: sessions with guests, each through a migration
    :ivar reclaimed: what the host took from the guest
    :ivar skipped: parts that were left out, and why
    :ivar host: how busy the machine was from the beginning to the end
    """

    passages: list[MigrationRecord] = field(default_factory=list)
    lines: dict[str, list[Line]] = field(default_factory=dict)
    huge_pages: list[HugePages] = field(default_factory=list)
    blocks_before: int | None = None
    speeds: list[float] = field(default_factory=list)
    cancelled: list[CancelRecord] = field(default_factory=list)
    injured: list[FaultCase] = field(default_factory=list)
    reachability: list[Reachability] = field(default_factory=list)
    conversations: list[Conversation] = field(default_factory=list)
    reclaimed: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    host: HostLoad | None = None
