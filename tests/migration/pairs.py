"""A source and a destination in one process, with real sockets between them."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from sterna.migration.controller import MigrationController
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.testing.guest import DoubleGuest

TIMEOUT = 300.0
TCP = "tcp:127.0.0.1:0"
ANYWHERE = "tcp:127.0.0.1:9"
"""Nobody connects there: what is to be refused is refused before."""


@dataclass
class Host:
    """A guest and its migrations; events can be waited for."""

    guest: DoubleGuest
    controller: MigrationController = field(init=False)
    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self.controller = MigrationController(self.guest, self._emit)
        self.controller.set_capabilities({"events": True})

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        with self._changed:
            self.events.append((name, data))
            self._changed.notify_all()

    @property
    def statuses(self) -> list[str]:
        with self._changed:
            return [data["status"] for name, data in self.events if name == "MIGRATION"]

    def wait_status(self, status: MigrationStatus, count: int = 1) -> None:
        with self._changed:
            reached = self._changed.wait_for(lambda: self.statuses.count(status.value) >= count, TIMEOUT)
        assert reached, f"no {status.value}: {self.statuses}"

    def wait_pass(self, number: int) -> None:
        with self._changed:
            reached = self._changed.wait_for(
                lambda: ("MIGRATION_PASS", {"pass": number}) in self.events, TIMEOUT
            )
        assert reached, self.events

    def wait_info(self, condition: Callable[[MigrationInfo], bool]) -> MigrationInfo:
        """What the controller tells once the condition holds of it."""
        deadline = time.monotonic() + TIMEOUT
        while not condition(info := self.controller.info()):
            assert time.monotonic() < deadline, info
            time.sleep(0.001)
        return info

    def migrate(self, uri: str) -> MigrationInfo:
        """Migrate and wait for the outcome."""
        self.controller.migrate(uri)
        return self.outcome()

    def expire(self) -> None:
        """The switchover's time limit passes now: a real one may be over before the migration has come to where it is needed."""
        source = self.controller._source
        assert source is not None
        source.context.expire()

    def outcome(self) -> MigrationInfo:
        info = self.controller.wait(TIMEOUT)
        assert not info.status.running, info
        return info

    def close(self) -> None:
        self.controller.close()
        self.guest.close()


@contextmanager
def hosts(*guests: DoubleGuest) -> Iterator[list[Host]]:
    """One host for each guest, closed at the end."""
    made = [Host(guest) for guest in guests]
    try:
        yield made
    finally:
        for host in made:
            host.close()


def source_guest(pages: int = 64, steps: int = 200, **options: Any) -> DoubleGuest:
    """A guest that runs and has written to its memory."""
    guest = DoubleGuest(pages, **options)
    guest.step_until(steps)
    return guest


def waiting_guest(pages: int = 64) -> DoubleGuest:
    return DoubleGuest(pages, running=False)


def assert_one_runs(source: DoubleGuest, destination: DoubleGuest) -> DoubleGuest:
    """Exactly one of the two runs, its memory is whole, and nothing is logged any more."""
    assert source.running != destination.running, (source.running, destination.running)
    assert not source.logging
    assert not destination.logging
    runner = source if source.running else destination
    runner.step_until(runner.steps + 1)
    runner.check_ram()
    return runner
