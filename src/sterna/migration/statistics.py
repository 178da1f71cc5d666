"""What a migration measures, and what each number means.

Bytes are those of the stream, headers included. Times that QEMU reports in ms are whole ms in `to_qmp`.

- **Pass**: from one sync of the dirty log to the next. Pass 1 sends every page. Its `dirty_pages` are
what the sync at its end found: the work of the next pass. The last pass runs while the guest is stopped.
- **Transferred**: bytes of the stream handed to the kernel. **Remaining**: bytes of RAM in pages not sent
since they were last dirtied, as known at the last sync. **Total**: bytes of guest RAM.
- **Multifd bytes**: those of transferred that went on multifd channels, packet headers included.
- **Duplicate** pages held only zeros and went as a mark; **normal** pages went whole.
With XBZRLE, pages that went as what changed, and pages that had not changed, are neither; they are **saved**.
- **mbps**: stream bits per microsecond over the last 100 ms or so spent sending pages that are not zero.
- **Dirty rate**: pages found dirty by the last sync, over the time since the sync before.
- **Setup time**: from the command to the first page. **Total time**: from the command to the outcome.
- **Expected downtime**, or predicted: what stopping at the last sync of the dirty log was predicted to cost, by
the same parts as the downtime (`sterna.migration.forecast`). Once there is a downtime, `predicted-
downtime-ms` over `downtime-ms` says how good the prediction was that the guest was stopped on.
- **Downtime**: from the moment the last vCPU left guest mode at the source to the moment before the first
guest instruction at the destination, both CLOCK_REALTIME, the destination's corrected by the clock offset
that the handshake measured. Against a peer that does not tell when it starts: to its confirmation, and to the
end of the stream where there is no way back. `DowntimeParts` splits it.
"""

from dataclasses import dataclass, field
from enum import Enum
from itertools import accumulate, pairwise
from typing import Any

from sterna.host.address import parse_inet
from sterna.memory.address import PAGE_SIZE
from sterna.migration.lostwrites import AuditReport
from sterna.stream.unmatched import UnmatchedPart
from sterna.stream.xbzrle.statistics import XbzrleStatistics


class MigrationStatus(Enum):
    """QEMU's MigrationStatus, as far as it applies.

    ::

        none -> setup -> active -> device -> completed
                  |         |         |
                  +---------+---------+--> cancelling -> cancelled
                  +---------+---------+--> failed

    An incoming migration has no `device` and no `cancelling`; after `failed` it may go to `setup` again.
    """

    NONE = "none"
    SETUP = "setup"
    ACTIVE = "active"
    DEVICE = "device"
    COMPLETED = "completed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def running(self) -> bool:
        """Whether the migration has no outcome yet."""
        return self in _RUNNING


_RUNNING = {
    MigrationStatus.SETUP,
    MigrationStatus.ACTIVE,
    MigrationStatus.DEVICE,
    MigrationStatus.CANCELLING,
}


PASS_LIMIT = 1000
"""How many passes are remembered; of a migration that does not converge, the last ones."""


@dataclass(frozen=True)
class Pass:
    """One pass over dirty memory.

    :ivar number: counted from 1
    :ivar pages: pages sent
    :ivar bytes: bytes of the stream that they took
    :ivar seconds: from one sync of the dirty log to the next; 0 while it runs
    :ivar dirty_pages: pages that the sync at its end found; 0 for the last pass
    :ivar throttle_percent: how much of its time the guest was kept from running
    :ivar zero_pages: how many pages held only zeros
    :ivar predicted_downtime_ms: of a stop right after the pass; None for the last pass
    """

    number: int
    pages: int = 0
    bytes: int = 0
    seconds: float = 0.0
    dirty_pages: int = 0
    throttle_percent: int = 0
    zero_pages: int = 0
    predicted_downtime_ms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "pages": self.pages,
            "zero_pages": self.zero_pages,
            "bytes": self.bytes,
            "ms": round(self.seconds * 1000, 3),
            "dirty_pages_after": self.dirty_pages,
            "throttle_percent": self.throttle_percent,
            "predicted_downtime_ms": _rounded(self.predicted_downtime_ms),
        }


@dataclass(frozen=True)
class DowntimeParts:
    """Where the downtime went, in ms; the parts follow each other and add up to it.

    :ivar stop: devices quiesced after the last vCPU had left guest mode
    :ivar last_pass: last sync of the dirty log, and its pages handed to the channel
    :ivar device_state: devices saved and handed to the channel
    :ivar digest: waiting for the source's digest beyond that, and handing it over
    :ivar destination_load: until the destination had received, verified and loaded everything
    :ivar start: until its first guest instruction
    """

    stop: float = 0.0
    last_pass: float = 0.0
    device_state: float = 0.0
    digest: float = 0.0
    destination_load: float = 0.0
    start: float = 0.0

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))

    def to_dict(self) -> dict[str, float]:
        return {name.replace("_", "-"): round(value, 3) for name, value in vars(self).items()}


@dataclass
class Timeline:
    """CLOCK_REALTIME in ns at the ends of the downtime's parts, and what is known of its last."""

    stop: int = 0
    stopped: int = 0
    last_pass: int = 0
    device_state: int = 0
    digest: int = 0
    loaded: int = 0
    started: int = 0

    def parts(self) -> DowntimeParts:
        """The downtime, from one mark to the next."""
        # A mark that was never set (nobody told) ends its part at once.
        marks = accumulate(vars(self).values(), max)
        return DowntimeParts(*((after - before) / 1e6 for before, after in pairwise(marks)))


@dataclass(frozen=True)
class MigrationInfo:
    """A snapshot of one migration, outgoing or incoming; final once the status is not `running`.

    :ivar uri: where to, or where from
    :ivar policy: what decides when the guest is stopped (`sterna.migration.policy`)
    :ivar verdict: why it is not expected to converge, and what would do; empty when it is
    :ivar predicted_downtime: by part, as of the last sync of the dirty log
    :ivar least_downtime_ms: what a switchover is predicted to take when nothing is left to send; None before the first pass
    :ivar error: why it failed, one line
    :ivar peer: what the other end is: ``sterna``, ``qemu`` or empty while unknown or on one-way channels
    :ivar verified: both ends' digests agreed; None when they were not compared
    :ivar ram_digest_source: root digest at the source, 16 hexadecimal digits
    :ivar digest_ms: how long the source took to digest its RAM, most of it behind the sending of the last
        pages
    :ivar clock_offset_ns: the destination's CLOCK_REALTIME minus the source's, 0 when within the measuring
        error
    :ivar clock_note: set when the two clocks gave an impossible downtime, which was clamped
    :ivar audit: what the audit of the dirty log found so far; None without one
    :ivar throttle_percent: how much of their time the guest's vCPUs are kept from running
    :ivar xbzrle: what the XBZRLE cache did, as of the end of the last pass; None without one
    :ivar in_doubt: the guest may run at the other end; it stays paused here
    :ivar socket_address: where an incoming migration listens
    :ivar source: where an incoming guest comes from, for people
    :ivar left_behind: what an incoming guest brought and has no place here
    """

    status: MigrationStatus = MigrationStatus.NONE
    incoming: bool = False
    uri: str = ""
    error: str = ""
    peer: str = ""
    migration_id: str = ""
    total_time_ms: float = 0.0
    setup_time_ms: float = 0.0
    expected_downtime_ms: float = 0.0
    downtime_ms: float | None = None
    downtime_parts: DowntimeParts = DowntimeParts()
    policy: str = ""
    verdict: str = ""
    predicted_downtime: DowntimeParts | None = None
    least_downtime_ms: float | None = None
    passes: tuple[Pass, ...] = ()
    pass_number: int = 0
    transferred: int = 0
    multifd_bytes: int = 0
    remaining: int = 0
    total: int = 0
    zero_pages: int = 0
    normal_pages: int = 0
    saved_pages: int = 0
    dirty_pages_rate: float = 0.0
    bytes_per_second: float = 0.0
    pages_per_second: float = 0.0
    downtime_bytes: int = 0
    verified: bool | None = None
    ram_digest_source: str = ""
    ram_digest_destination: str = ""
    digest_ms: float | None = None
    clock_offset_ns: int = 0
    clock_note: str = ""
    throttle_percent: int = 0
    xbzrle: XbzrleStatistics | None = None
    audit: AuditReport | None = None
    in_doubt: bool = False
    socket_address: str = ""
    source: str = ""
    left_behind: tuple[UnmatchedPart, ...] = ()

    def to_qmp(self) -> dict[str, Any]:
        """As QMP's query-migrate answers (QEMU 7.2, MigrationInfo); our own fields are under ``x-sterna``."""
        if self.status is MigrationStatus.NONE:
            return {}
        answer: dict[str, Any] = {"status": self.status.value}
        if self.error:
            answer["error-desc"] = self.error
        if self.socket_address:
            answer["socket-address"] = [_socket_address(self.socket_address)]
        if not self.incoming and self.status is not MigrationStatus.SETUP:
            answer |= {
                "total-time": round(self.total_time_ms),
                "setup-time": round(self.setup_time_ms),
                "ram": self._ram(),
            }
            if self.status is MigrationStatus.COMPLETED:
                answer["downtime"] = round(self.downtime_ms or 0.0)
            elif self.status.running:
                answer["expected-downtime"] = round(self.expected_downtime_ms)
            if self.xbzrle is not None:
                answer["xbzrle-cache"] = self.xbzrle.to_qmp()
            if self.throttle_percent:
                answer["cpu-throttle-percentage"] = self.throttle_percent
        answer["x-sterna"] = self._extras()
        return answer

    def _ram(self) -> dict[str, Any]:
        return {
            "transferred": self.transferred,
            "remaining": self.remaining,
            "total": self.total,
            "duplicate": self.zero_pages,
            "skipped": 0,
            "normal": self.normal_pages,
            "normal-bytes": self.normal_pages * PAGE_SIZE,
            "dirty-pages-rate": round(self.dirty_pages_rate),
            "mbps": self.bytes_per_second * 8 / 1e6,
            "dirty-sync-count": self.pass_number,
            "postcopy-requests": 0,
            "page-size": PAGE_SIZE,
            "multifd-bytes": self.multifd_bytes,
            "pages-per-second": round(self.pages_per_second),
            "precopy-bytes": self.transferred - self.downtime_bytes,
            "downtime-bytes": self.downtime_bytes,
            "postcopy-bytes": 0,
            "dirty-sync-missed-zero-copy": 0,
        }

    def _extras(self) -> dict[str, Any]:
        extras: dict[str, Any] = {"uri": self.uri, "peer": self.peer, "migration-id": self.migration_id}
        if self.verified is not None:
            extras["verified"] = self.verified
        extras |= {
            "ram-digest-source": self.ram_digest_source,
            "ram-digest-destination": self.ram_digest_destination,
            "in-doubt": self.in_doubt,
        }
        if self.digest_ms is not None:
            extras["digest-ms"] = round(self.digest_ms, 3)
        if not self.incoming:
            extras |= {
                "total-ms": round(self.total_time_ms, 3),
                "passes": [each.to_dict() for each in self.passes],
                "clock-offset-ns": self.clock_offset_ns,
            }
            extras["saved-pages"] = self.saved_pages
            extras |= {"policy": self.policy, "verdict": self.verdict}
            if self.least_downtime_ms is not None:
                extras["least-downtime-ms"] = round(self.least_downtime_ms, 3)
            if self.predicted_downtime is not None:
                extras["predicted-downtime-ms"] = round(self.predicted_downtime.total, 3)
                extras["predicted-downtime-parts"] = self.predicted_downtime.to_dict()
            if self.downtime_ms is not None:
                extras["downtime-ms"] = round(self.downtime_ms, 3)
                extras["downtime-parts"] = self.downtime_parts.to_dict()
                if self.predicted_downtime is not None and self.downtime_ms:
                    extras["predicted-over-real"] = round(self.predicted_downtime.total / self.downtime_ms, 3)
        if self.audit is not None:
            extras["audit"] = self.audit.to_qmp()
        if self.source:
            extras["source"] = self.source
        if self.left_behind:
            extras["left-behind"] = [part.to_qmp() for part in self.left_behind]
        if self.clock_note:
            extras["clock-note"] = self.clock_note
        return extras


def _rounded(ms: float | None) -> float | None:
    return None if ms is None else round(ms, 3)


def _socket_address(uri: str) -> dict[str, str]:
    """A listening URI as QMP's SocketAddress."""
    kind, _, rest = uri.partition(":")
    if kind == "unix":
        return {"type": "unix", "path": rest}
    address = parse_inet(rest)
    return {"type": "inet", "host": address.host, "port": str(address.port)}


WINDOW_SECONDS = 0.1
"""How long bandwidth is averaged over."""


@dataclass
class Bandwidth:
    """Bytes and pages per second over windows of about 100 ms spent sending; until the first is full, its
    mean so far.

    :ivar bytes_per_second: 0 until something was measured
    """

    bytes_per_second: float = 0.0
    pages_per_second: float = 0.0
    _bytes: int = 0
    _pages: int = 0
    _seconds: float = 0.0
    _full: bool = field(default=False)

    def add(self, size: int, pages: int, seconds: float) -> None:
        """Count bytes and pages whose sending took so long, pacing included."""
        self._bytes += size
        self._pages += pages
        self._seconds += seconds
        if self._seconds >= WINDOW_SECONDS or (not self._full and self._seconds > 0):
            self.bytes_per_second = self._bytes / self._seconds
            self.pages_per_second = self._pages / self._seconds
        if self._seconds >= WINDOW_SECONDS:
            self._bytes, self._pages, self._seconds, self._full = 0, 0, 0.0, True
