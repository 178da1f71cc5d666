"""PSCI calls without a VM (ARM DEN 0022D, chapter 5)."""

import threading
from dataclasses import dataclass, field

import pytest
from tests.hypervisor.conftest import wait_until

from sterna.arch.arm import psci
from sterna.hypervisor.interface import SystemEvent

VERSION, CPU_SUSPEND, CPU_OFF, CPU_ON, AFFINITY_INFO = (0x8400_0000 + number for number in range(5))
MIGRATE_INFO_TYPE, SYSTEM_OFF, SYSTEM_RESET, FEATURES = 0x8400_0006, 0x8400_0008, 0x8400_0009, 0x8400_000A
SUCCESS, NOT_SUPPORTED, INVALID_PARAMETERS, ALREADY_ON, ON_PENDING = (
    0,
    -1 & (1 << 32) - 1,
    0xFFFF_FFFE,
    0xFFFF_FFFC,
    0xFFFF_FFFB,
)


class Lock:
    """A lock that tells when somebody waits for it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.awaited = threading.Event()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            self.awaited.set()
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


@dataclass
class Cpu:
    powered_off: bool = False
    starting: bool = False
    started: list[tuple[int, int]] = field(default_factory=list)
    power_lock: Lock = field(default_factory=Lock, compare=False)

    def power_on(self, entry: int, context: int) -> None:
        self.started.append((entry, context))


class Board:
    def __init__(self) -> None:
        self.cpus = [Cpu(), Cpu(powered_off=True), Cpu(powered_off=True, starting=True)]
        self.events: list[SystemEvent] = []

    def call(self, function: int, *arguments: int, cpu: int = 0) -> int:
        padded = (*arguments, 0, 0, 0)[:3]
        return psci.call(function, padded, self.cpus, self.cpus[cpu], self.events.append)


@pytest.mark.parametrize(
    ("function", "arguments", "answer"),
    [
        (VERSION, (), 0x1_0001),
        (MIGRATE_INFO_TYPE, (), 2),
        (CPU_SUSPEND, (), SUCCESS),
        *((FEATURES, (known,), SUCCESS) for known in (VERSION, CPU_ON, SYSTEM_RESET, FEATURES)),
        (FEATURES, (0x8400_0005,), NOT_SUPPORTED),
        (AFFINITY_INFO, (0,), 0),
        (AFFINITY_INFO, (1,), 1),
        (AFFINITY_INFO, (2,), 2),
        (AFFINITY_INFO, (3,), INVALID_PARAMETERS),
        (CPU_ON, (0,), ALREADY_ON),
        (CPU_ON, (2,), ON_PENDING),
        (CPU_ON, (3,), INVALID_PARAMETERS),
        (0x8400_0005, (), NOT_SUPPORTED),
        (0, (), NOT_SUPPORTED),
    ],
)
def test_answers(function: int, arguments: tuple[int, ...], answer: int) -> None:
    board = Board()
    before = [Cpu(cpu.powered_off, cpu.starting) for cpu in board.cpus]
    assert board.call(function, *arguments) == answer
    assert board.cpus == before
    assert board.events == []


def test_a_cpu_is_started_where_the_caller_says() -> None:
    board = Board()
    # The upper byte of an affinity is not one of its levels.
    assert board.call(CPU_ON, 0x8000_0001, 0x4020_0000, 7) == SUCCESS
    assert [cpu.started for cpu in board.cpus] == [[], [(0x4020_0000, 7)], []]


def test_of_two_that_start_a_cpu_at_once_one_does() -> None:
    """The second asks while the first has looked at the CPU and not yet started it."""
    board = Board()
    answers: list[int] = []
    second = threading.Thread(target=lambda: answers.append(board.call(CPU_ON, 1, 0x2000, cpu=0)))

    class Target(Cpu):
        def power_on(self, entry: int, context: int) -> None:
            if entry == 0x1000:
                second.start()
                wait_until(lambda: self.power_lock.awaited.is_set() or not second.is_alive(), "the second")
            super().power_on(entry, context)
            self.starting = True

    board.cpus[1] = Target(powered_off=True)
    assert board.call(CPU_ON, 1, 0x1000) == SUCCESS
    second.join()
    assert answers == [ON_PENDING]
    assert board.cpus[1].started == [(0x1000, 0)]


def test_a_cpu_switches_itself_off() -> None:
    board = Board()
    board.cpus[1].powered_off = False
    assert board.call(CPU_OFF, cpu=1) == SUCCESS
    assert [cpu.powered_off for cpu in board.cpus] == [False, True, True]


@pytest.mark.parametrize(
    ("function", "event"), [(SYSTEM_OFF, SystemEvent.SHUTDOWN), (SYSTEM_RESET, SystemEvent.RESET)]
)
def test_the_system_goes_off_or_begins_anew(function: int, event: SystemEvent) -> None:
    board = Board()
    assert board.call(function) == SUCCESS
    assert board.events == [event]
