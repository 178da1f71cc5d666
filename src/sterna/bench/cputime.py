"""The CPU time of processes."""

import os
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
# Fields 14 and 15 of /proc/PID/stat (proc(5)), counted after the name and its bracket, which end field 2.
_USER, _SYSTEM = 14 - 3, 15 - 3


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all of its threads, user and system.

    :raise OSError: When there is no such process.
    """
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return (int(fields[_USER]) + int(fields[_SYSTEM])) / _TICKS
