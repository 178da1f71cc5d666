"""A guest that is handed on and on, while connections are cut and migrations cancelled at random places."""

import random
from collections import Counter

import pytest
from tests.migration.pairs import TCP, Host, assert_one_runs, source_guest, waiting_guest
from tests.migration.proxy import Fault, Proxy

from sterna.migration.statistics import MigrationStatus

PAGES = 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_no_fault_loses_the_guest_or_a_write(seed: int) -> None:
    rng = random.Random(seed)
    outcomes: Counter[str] = Counter()
    here = Host(source_guest(PAGES, steps_per_ms=30))
    try:
        for _ in range(100):
            there = Host(waiting_guest(PAGES))
            here.events.clear()
            port = int(there.controller.incoming(TCP).rpartition(":")[2])
            fault = rng.choice(
                [
                    Fault(),
                    Fault(forward=rng.randrange(4_000_000), reset=rng.random() < 0.5),
                    Fault(backward=rng.randrange(320), reset=rng.random() < 0.5),
                ]
            )
            cancel_at = None
            if fault == Fault() and rng.random() < 0.6:
                cancel_at = rng.choice([MigrationStatus.ACTIVE, MigrationStatus.DEVICE])
            # A pass takes seconds where it is to be cancelled in one.
            slow = cancel_at is MigrationStatus.ACTIVE
            here.controller.set_parameters({"max-bandwidth": 50_000 if slow else rng.choice([0, 60_000_000])})
            with Proxy(port, fault) as proxy:
                here.controller.migrate(proxy.uri)
                if cancel_at is not None:
                    here.wait_status(cancel_at)
                    here.controller.cancel()
                info = here.outcome()
            if len(there.events) > 1:
                there.controller.wait(300)
            assert not info.in_doubt
            owner = assert_one_runs(here.guest, there.guest)
            assert (owner is there.guest) == (info.status is MigrationStatus.COMPLETED)
            outcomes[info.status.value] += 1
            if owner is there.guest:
                here, there = there, here
            there.close()
    finally:
        here.close()
    assert min(outcomes[name] for name in ("completed", "failed", "cancelled")) > 3, outcomes
