"""The host's part in a measurement: the CPU time of processes, and memory that is at hand."""

import os
from pathlib import Path

from sterna.memory.address import PAGE_SIZE
from sterna.memory.ram import RamBlock

_TICKS = os.sysconf("SC_CLK_TCK")
# Fields 14 and 15 of /proc/PID/stat (proc(5)), counted after the name and its bracket, which end field 2.
_USER, _SYSTEM = 14 - 3, 15 - 3
_MEMORY_SHARE = 0.8


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all of its threads, user and system.

    :raise OSError: When there is no such process.
    """
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS


def available_memory() -> int:
    """Bytes that processes can have without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return os.sysconf("SC_AVPHYS_PAGES") * PAGE_SIZE


def recycle_memory(size: int) -> None:
    """Take memory from the host and give it back, for whoever needs some next.

    A host that is virtual itself often has to ask for memory that is touched for the first time, or that was given back a
    few seconds ago (free page reporting); that costs many times as much as moving a page there. A destination, which touches
    its RAM as it arrives, finds memory at hand when this is done just before.
    """
    size = min(size, int(available_memory() * _MEMORY_SHARE)) // PAGE_SIZE * PAGE_SIZE
    with RamBlock("recycled", size) as block:
        block.data[::PAGE_SIZE] = 1
