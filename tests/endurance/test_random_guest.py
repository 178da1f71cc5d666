"""The guest that knows its own memory, migrated to and fro while connections are cut and migrations cancelled.

`STERNA_MIGRATIONS=200 python -m pytest tests/endurance -s` runs as many as one likes and says what happened.
"""

import collections
import os
import random
import time

import pytest
from tests.migration.proxy import Fault, Proxy

from sterna.guests.check import check_random, check_state
from sterna.guests.layout import StatusError, read_status_of_ram
from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.machine.runstate import RunState
from sterna.migration.controller import MigrationController
from sterna.migration.statistics import MigrationStatus

MIGRATIONS = int(os.environ.get("STERNA_MIGRATIONS", "12"))
MEMORY = 32 << 20
PAGES = 5000
STREAM_BYTES = 24 << 20
TIMEOUT_S = 300


class Host:
    """One end: a machine and its migrations."""

    def __init__(self, *, incoming):
        self.machine = Machine(
            MachineConfig(
                smp=2,
                memory_bytes=MEMORY,
                kernel=None if incoming else "random",
                append="" if incoming else f"7 {PAGES}",
                incoming=incoming,
            )
        )
        self.migration = MigrationController(MigratableMachine(self.machine), lambda name, data: None)

    @property
    def state(self):
        return self.machine.run_state

    def steps(self):
        status = read_status_of_ram(self.machine.ram_blocks[0].data)
        return [int(status.cpu(index)["steps"]) for index in range(2)]

    def has_started(self):
        try:
            return all(self.steps())
        except (StatusError, IndexError):
            return False

    def await_progress(self):
        """Both vCPUs do another step."""
        before = self.steps()
        try:
            wait_until(
                lambda: all(now > then for now, then in zip(self.steps(), before, strict=True)),
                "a step of the guest",
            )
        except AssertionError as error:
            cpus = [f"CPU {cpu}, {before[cpu]} steps:\n{self.machine.registers(cpu)}" for cpu in range(2)]
            raise AssertionError("\n".join([str(error), str(self.steps()), *cpus])) from None

    def problems(self):
        """What is wrong with the guest's memory."""
        self.machine.stop()
        ram = self.machine.ram_blocks[0].data
        status = read_status_of_ram(ram)
        found = check_state(status) + check_random(ram, status)
        self.machine.cont()
        return found

    def close(self):
        self.migration.close()
        self.machine.close()


def wait_until(condition, what):
    end = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end, f"{what} did not come in {TIMEOUT_S} s"
        time.sleep(0.001)


def draw_fault(rng):
    kind = rng.choice(["none", "none", "cancel", "cut", "cut late", "cut back"])
    at = rng.randrange(STREAM_BYTES)
    return kind, {
        "cut": Fault(forward=at, reset=rng.random() < 0.5),
        "cut late": Fault(forward=STREAM_BYTES - rng.randrange(1 << 20)),
        "cut back": Fault(backward=rng.randrange(400)),
    }.get(kind, Fault())


def attempt(source, target_uri, kind, rng):
    """One migration: its outcome."""
    source.migration.migrate(target_uri)
    if kind == "cancel":
        pause = rng.random() * 0.15
        source.migration.wait(pause)
        source.migration.cancel()
    info = source.migration.wait(TIMEOUT_S)
    assert info.status in (MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED)
    assert not info.in_doubt, info.error
    return info


def check_exactly_one_runs(source, target, completed):
    states = (source.state, target.state)
    expected = (
        (RunState.POSTMIGRATE, RunState.RUNNING) if completed else (RunState.RUNNING, RunState.INMIGRATE)
    )
    assert states == expected


@pytest.mark.slow
def test_random_guest_survives(capsys):
    rng = random.Random(20140601)
    outcomes = collections.Counter()
    source = Host(incoming=False)
    source.machine.cont()
    wait_until(source.has_started, "the guest's start")
    completed = 0
    downtimes = []
    try:
        while completed < MIGRATIONS:
            target = Host(incoming=True)
            port = int(target.migration.incoming("tcp:127.0.0.1:0").rpartition(":")[2])
            moved = False
            while not moved:
                kind, fault = draw_fault(rng)
                proxy = Proxy(port, fault)
                source.migration.set_parameters(
                    {
                        "max-bandwidth": rng.choice([0, 200_000_000]),
                        "x-sterna-doubt-timeout": TIMEOUT_S * 1000,
                    }
                )
                info = attempt(source, proxy.uri, kind, rng)
                proxy.close()
                moved = info.status is MigrationStatus.COMPLETED
                outcomes[f"{kind}: {info.status.value}"] += 1
                if moved:
                    wait_until(lambda t=target: t.state is RunState.RUNNING, "the guest's start")
                    assert info.verified
                    downtimes.append(info.downtime_ms)
                check_exactly_one_runs(source, target, moved)
                (target if moved else source).await_progress()
            completed += 1
            source.close()
            source = target
            assert source.problems() == []
    finally:
        source.close()
    with capsys.disabled():
        downtimes.sort()
        print(
            f"\n{completed} migrations completed and verified, no page lost; {dict(sorted(outcomes.items()))}; "
            f"downtime median {downtimes[len(downtimes) // 2]:.0f} ms, largest {downtimes[-1]:.0f} ms"
        )
