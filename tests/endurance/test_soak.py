"""What stays of a migration that has ended: nothing, at either end. `make soak` watches the memory of processes."""

import gc
import os
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from tests.cli.vms import pair, wait_for
from tests.endurance.soak import Look, Soaked, soak
from tests.migration.pairs import TCP, Host, hosts, source_guest, waiting_guest
from tests.migration.proxy import Fault, Proxy

from sterna.migration.statistics import MigrationStatus

pytestmark = pytest.mark.slow

ROUNDS = 5
HEAP_BYTES = 64 << 20
OURS = ("sterna.", "tests.", "mmap", "_thread", "threading", "socket", "_io", "concurrent.")


def held() -> Counter[str]:
    """How many there are of our own objects, of those that hold memory, threads or descriptors, and of what they hold."""
    gc.collect()
    names = (f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.get_objects())
    found = Counter(name for name in names if name.startswith(OURS))
    return found + Counter(
        descriptors=len(os.listdir("/proc/self/fd")), running_threads=threading.active_count()
    )


def attempts(source: Host, port: int, *, multifd: bool) -> None:
    """One migration that is cancelled, one whose connection is cut while RAM is on its way, and one that is cut at once."""
    at_rest = set(threading.enumerate())
    for fault in (None, Fault(forward=100_000, victim=int(multifd)), Fault(forward=5, reset=True)):
        with Proxy(port, fault or Fault()) as proxy:
            source.controller.migrate(proxy.uri)
            if fault is None:
                source.wait_pass(2)
                source.controller.cancel()
            info = source.outcome()
            wanted = MigrationStatus.FAILED if fault else MigrationStatus.CANCELLED
            assert info.status is wanted, info
        # The destination learns a little later than the source that a connection is gone.
        wait_for(lambda: set(threading.enumerate()) <= at_rest)
        source.events.clear()


@pytest.mark.parametrize("multifd", [False, True])
def test_nothing_stays_of_a_migration_that_has_ended(multifd: bool) -> None:
    with hosts(source_guest(512, steps_per_harvest=40), waiting_guest(512)) as (source, destination):
        for host in (source, destination):
            host.controller.set_capabilities({"multifd": multifd})
        source.controller.set_parameters(
            {"max-bandwidth": 20_000_000, "downtime-limit": 0, "x-sterna-policy": "fixed"}
        )
        port = int(destination.controller.incoming(TCP).rpartition(":")[2])
        for _ in range(2):
            attempts(source, port, multifd=multifd)
        before = held()
        for _ in range(ROUNDS):
            attempts(source, port, multifd=multifd)

        grown = {name: more for name, more in (held() - before).items() if more >= ROUNDS}
        assert not grown, "there is one more of these after each round"


def test_a_machine_has_one_heap_for_all_threads(tmp_path: Path) -> None:
    with pair(tmp_path) as (source, destination):
        source.qmp.execute("migrate", {"uri": destination.incoming_uri()})
        wait_for(lambda: source.qmp.command("query-migrate")["status"] == "completed")
        assert [heaps_of_threads(end.process.pid) for end in (source, destination)] == [0, 0]


def heaps_of_threads(pid: int) -> int:
    """As glibc makes them (HEAP_MAX_SIZE of malloc/arena.c): 64 MiB of addresses, of which the first part may be used."""
    mappings = [line.split() for line in Path(f"/proc/{pid}/maps").read_text().splitlines()]
    parts = [
        (*(int(end, 16) for end in words[0].split("-")), words[1]) for words in mappings if words[4] == "0"
    ]
    return sum(
        start % HEAP_BYTES == 0 and access == "rw-p" and (end, start + HEAP_BYTES, "---p") in parts
        for start, end, access in parts
    )


def test_what_is_free_within_the_heap_is_given_back() -> None:
    program = """
import ctypes
from sterna.cli import heap
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) >> 8
before = resident()
blocks = [libc.malloc(50_000) for _ in range(1000)]
for block in blocks:
    ctypes.memset(block, 1, 50_000)
for block in blocks[:-1]:
    libc.free(block)
held = resident()
heap.give_back()
print(held - before, resident() - before)
"""
    run = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    held, left = map(int, run.stdout.split())
    assert held > 40, "MiB, of which glibc gives nothing back by itself"
    assert left < 8


def test_the_slope_leaves_out_what_is_taken_once() -> None:
    looks = [Look(n, 1000 + 500 * min(n, 30) + 2 * n, 1000) for n in range(10, 100, 10)]
    source, destination = Soaked(tuple(looks), Counter()).slopes()
    assert source == pytest.approx(2)
    assert destination == pytest.approx(0)


def test_a_short_soak() -> None:
    found = soak(6, multifd=True)
    assert [look.after for look in found.looks] == [1, 2, 3, 4, 5, 6]
    assert sum(found.outcomes.values()) == 6
    assert not found.outcomes["completed"]
