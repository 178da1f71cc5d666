"""The running account of a migration. The engine writes it, anyone may take a snapshot."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from sterna.errors import InternalError
from sterna.memory.address import PAGE_SIZE
from sterna.migration.statistics import (
    PASS_LIMIT,
    Bandwidth,
    DowntimeParts,
    MigrationInfo,
    MigrationStatus,
    Pass,
)
from sterna.migration.transport.sender import Sent

log = logging.getLogger(__name__)

Emit = Callable[[str, dict[str, Any]], None]
"""Called with an event's name and data, as QMP sends them."""


class IllegalTransition(InternalError):
    """A status that cannot follow the present one: a bug here."""


_NEXT: dict[MigrationStatus, set[MigrationStatus]] = {
    MigrationStatus.NONE: {MigrationStatus.SETUP},
    MigrationStatus.SETUP: {
        MigrationStatus.ACTIVE,
        MigrationStatus.CANCELLING,
        MigrationStatus.CANCELLED,
        MigrationStatus.FAILED,
    },
    MigrationStatus.ACTIVE: {
        MigrationStatus.DEVICE,
        MigrationStatus.COMPLETED,
        MigrationStatus.CANCELLING,
        MigrationStatus.CANCELLED,
        MigrationStatus.FAILED,
    },
    MigrationStatus.DEVICE: {MigrationStatus.COMPLETED, MigrationStatus.CANCELLING, MigrationStatus.FAILED},
    # Cancelled too late: the destination ran the guest already.
    MigrationStatus.CANCELLING: {
        MigrationStatus.CANCELLED,
        MigrationStatus.COMPLETED,
        MigrationStatus.FAILED,
    },
    MigrationStatus.CANCELLED: {MigrationStatus.SETUP},
    MigrationStatus.FAILED: {MigrationStatus.SETUP, MigrationStatus.ACTIVE},
    MigrationStatus.COMPLETED: set(),
}


@dataclass
class Progress:
    """:param emit: gets MIGRATION and MIGRATION_PASS events, on the engine's thread; what it raises is logged
    :param clock: monotonic time in seconds
    """

    emit: Emit
    uri: str
    incoming: bool = False
    clock: Callable[[], float] = time.monotonic
    bandwidth: Bandwidth = field(default_factory=Bandwidth)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()
        self._info = MigrationInfo(uri=self.uri, incoming=self.incoming)
        self._started = self.clock()
        self._pass: Pass | None = None
        self._pass_began = self._started
        self._synced_at = self._started

    def snapshot(self) -> MigrationInfo:
        """The migration as it is now."""
        with self._lock:
            if not self._info.status.running:
                return self._info
            return replace(
                self._info,
                total_time_ms=self._elapsed_ms(),
                bytes_per_second=self.bandwidth.bytes_per_second,
                pages_per_second=self.bandwidth.pages_per_second,
            )

    def enter(self, status: MigrationStatus, **changes: Any) -> None:
        """Change the status, with other fields at once; an outcome makes the account final."""
        with self._lock:
            self._change(status, **changes)
        self._announce("MIGRATION", {"status": status.value})

    def resolve(self, error: str) -> None:
        """A migration that failed in doubt is in doubt no more.

        :param error: what was found out, in one line
        """
        with self._lock:
            assert self._info.in_doubt
            self._info = replace(self._info, in_doubt=False, error=error)

    def cancelling(self) -> None:
        """The user cancelled; does nothing once there is an outcome."""
        with self._lock:
            if not self._info.status.running or self._info.status is MigrationStatus.CANCELLING:
                return
            self._change(MigrationStatus.CANCELLING)
        self._announce("MIGRATION", {"status": MigrationStatus.CANCELLING.value})

    def advance(self, status: MigrationStatus) -> None:
        """Enter a phase, unless the user has cancelled: then the phase passes under that name."""
        with self._lock:
            if self._info.status is MigrationStatus.CANCELLING:
                return
            self._change(status)
        self._announce("MIGRATION", {"status": status.value})

    def _announce(self, name: str, data: dict[str, Any]) -> None:
        """Tell whoever listens. What goes wrong there is no failure of the migration."""
        try:
            self.emit(name, data)
        except Exception:
            log.exception("a listener failed at the event %s", name)

    def _change(self, status: MigrationStatus, **changes: Any) -> None:
        with self._lock:
            before = self._info.status
            if status not in _NEXT[before]:
                raise IllegalTransition(f"a migration cannot go from {before.value} to {status.value}")
            if not status.running and status is not MigrationStatus.NONE:
                changes.setdefault("total_time_ms", self._elapsed_ms())
                changes.setdefault("bytes_per_second", self.bandwidth.bytes_per_second)
                changes.setdefault("pages_per_second", self.bandwidth.pages_per_second)
            self._info = replace(self._info, status=status, **changes)

    def note(self, **changes: Any) -> None:
        """Change fields of the account."""
        with self._lock:
            self._info = replace(self._info, **changes)

    def set_up(self) -> None:
        """The first page is about to be sent."""
        self.note(setup_time_ms=self._elapsed_ms())

    def begin_pass(self, remaining_pages: int) -> None:
        """A pass begins; `finish_pass` ends it."""
        with self._lock:
            number = self._info.pass_number + 1
            self._pass, self._pass_began = Pass(number), self.clock()
            self.note(pass_number=number, remaining=remaining_pages * PAGE_SIZE)
        self._announce("MIGRATION_PASS", {"pass": number})

    def sent(self, sent: Sent, *, final: bool) -> None:
        """Pages were handed to the channel.

        :param final: whether the guest is stopped
        """
        with self._lock:
            info, running = self._info, self.running_pass
            self._pass = replace(
                running,
                pages=running.pages + sent.pages,
                bytes=running.bytes + sent.size,
                zero_pages=running.zero_pages + sent.zero_pages,
            )
            self.note(
                transferred=info.transferred + sent.size,
                multifd_bytes=info.multifd_bytes + sent.multifd_bytes,
                downtime_bytes=info.downtime_bytes + (sent.size if final else 0),
                remaining=max(0, info.remaining - sent.pages * PAGE_SIZE),
                zero_pages=info.zero_pages + sent.zero_pages,
                normal_pages=info.normal_pages + sent.pages - sent.zero_pages - sent.saved_pages,
                saved_pages=info.saved_pages + sent.saved_pages,
            )
            if sent.pages > sent.zero_pages or self.bandwidth.bytes_per_second == 0:
                self.bandwidth.add(sent.size, sent.pages, sent.seconds)

    def received(self, size: int, normal_pages: int, zero_pages: int) -> None:
        """A destination has received so many more bytes, and pages in all."""
        with self._lock:
            self.note(
                transferred=self._info.transferred + size, normal_pages=normal_pages, zero_pages=zero_pages
            )

    def sent_other(self, size: int, *, final: bool = False) -> None:
        """Something other than pages was handed to the channel."""
        with self._lock:
            info = self._info
            self.note(
                transferred=info.transferred + size,
                downtime_bytes=info.downtime_bytes + (size if final else 0),
            )

    def finish_pass(self, dirty_pages: int) -> None:
        """A sync of the dirty log ended the pass, and found so many pages."""
        with self._lock:
            now = self.clock()
            finished = replace(
                self.running_pass,
                seconds=now - self._pass_began,
                dirty_pages=dirty_pages,
                throttle_percent=self._info.throttle_percent,
            )
            rate = dirty_pages / (now - self._synced_at) if now > self._synced_at else 0.0
            self._synced_at = now
            self.note(
                passes=(*self._info.passes[1 - PASS_LIMIT :], finished),
                dirty_pages_rate=rate,
                remaining=dirty_pages * PAGE_SIZE,
            )
            self._pass = None

    def synced(self, dirty_pages: int) -> None:
        """Between two passes there was another sync of the dirty log; so many pages are to be sent now."""
        with self._lock:
            self._synced_at = self.clock()
            self.note(remaining=dirty_pages * PAGE_SIZE)

    def predict(self, downtime: DowntimeParts) -> None:
        """The downtime if the guest had stopped at the last sync of the dirty log."""
        with self._lock:
            *before, last = self._info.passes
            passes = (*before, replace(last, predicted_downtime_ms=downtime.total))
            self.note(passes=passes, predicted_downtime=downtime, expected_downtime_ms=downtime.total)

    @property
    def elapsed_seconds(self) -> float:
        """Since the migration was started."""
        return self.clock() - self._started

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those that are over, the last `PASS_LIMIT`."""
        return self._info.passes

    @property
    def running_pass(self) -> Pass:
        """The pass that is under way, as far as it has come."""
        assert self._pass is not None
        return self._pass

    @property
    def pass_number(self) -> int:
        """The pass that is under way, or was last."""
        return self._info.pass_number

    @property
    def transferred(self) -> int:
        """Bytes of the stream that were handed to the kernel."""
        return self._info.transferred

    def _elapsed_ms(self) -> float:
        return self.elapsed_seconds * 1000
