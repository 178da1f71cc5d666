"""How busy the host was while something was timed: what a timing that fails says besides, in one line."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sterna.host.units import counted

_PROC = Path("/proc")
# proc(5), /proc/stat: columns of the first line, in ticks of all CPUs together. Time of guests is in USER and NICE already.
_USER, _NICE, _SYSTEM, _STEAL, _COLUMNS = 0, 1, 2, 7, 8
# proc(5), /proc/PID/stat, counted after the name, which is field 2: parent; user and system time; the same of its children
# that have ended and been waited for.
_PARENT, _OWN_TIMES, _TIMES = 4 - 3, slice(14 - 3, 16 - 3), slice(14 - 3, 18 - 3)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far, all of its threads, user and system.

    :raise OSError: When there is no such process.
    """
    return sum(map(int, _process_fields(_PROC / str(pid))[_OWN_TIMES])) / os.sysconf("SC_CLK_TCK")


def _process_fields(process: Path) -> list[bytes]:
    """What its `stat` has after its name, which is any bytes in brackets."""
    return (process / "stat").read_bytes().rpartition(b")")[2].split()


@dataclass(frozen=True)
class HostLoad:
    """How busy a host was for some time. What its kernel does not tell is None.

    :ivar cpus: its processors
    :ivar load_average: of the last minute, at the end
    :ivar others: part of the processors' time that processes had which are neither this one nor of its children; 0 to 1
    :ivar stolen: part of it that the hypervisor took that the host runs on
    :ivar waiting: part of the time in which something that could run waited for a processor (/proc/pressure/cpu)
    """

    cpus: int
    load_average: float | None
    others: float | None
    stolen: float | None
    waiting: float | None

    @property
    def taken(self) -> float:
        """Part of the processors' time that was not for whatever was timed."""
        return (self.others or 0.0) + (self.stolen or 0.0)

    def __str__(self) -> str:
        """Such as ``host meanwhile: 2 CPUs, load 14.4, other processes 83 %, stolen 0 %, CPU pressure 99 %``."""
        told = [counted(self.cpus, "CPU")]
        if self.load_average is not None:
            told.append(f"load {self.load_average:.1f}")
        if self.others is not None:
            told.append(f"other processes {100 * self.others:.0f} %")
        if self.stolen is not None:
            told.append(f"stolen {100 * self.stolen:.0f} %")
        if self.waiting is not None:
            told.append(f"CPU pressure {100 * self.waiting:.0f} %")
        return f"host meanwhile: {', '.join(told)}"


class HostWatch:
    """Looks at the host from when it is made on. Making one, and asking it, takes some milliseconds.

    :param proc: where the kernel tells
    """

    def __init__(self, proc: Path = _PROC) -> None:
        self._proc = proc
        self._cpu, self._own, self._pressure = self._sample()

    def load(self) -> HostLoad:
        """How busy the host has been so far."""
        cpu, own, pressure = self._sample()
        others = stolen = waiting = None
        if cpu is not None and self._cpu is not None:
            spent = [now - before for now, before in zip(cpu, self._cpu, strict=True)]
            if whole := sum(spent):
                others = max(0.0, spent[_USER] + spent[_NICE] + spent[_SYSTEM] - (own - self._own)) / whole
                stolen = spent[_STEAL] / whole
        if pressure is not None and self._pressure is not None:
            stalled, at = (now - before for now, before in zip(pressure, self._pressure, strict=True))
            waiting = min(1.0, stalled / at) if at > 0 else None
        return HostLoad(os.cpu_count() or 1, self._load_average(), others, stolen, waiting)

    def _sample(self) -> tuple[list[int] | None, int, tuple[float, float] | None]:
        """Ticks of all CPUs by kind, ticks of this process and its children, and seconds of stalls with when that was."""
        cpu = self._cpu_ticks()
        return cpu, 0 if cpu is None else sum(self._own_ticks()), self._stalled()

    def _cpu_ticks(self) -> list[int] | None:
        try:
            first = (self._proc / "stat").read_text().split("\n", 1)[0].split()
        except OSError:
            return None
        ticks = [int(text) for text in first[1 : 1 + _COLUMNS]]
        return ticks if first[:1] == ["cpu"] and len(ticks) == _COLUMNS else None

    def _own_ticks(self) -> Iterator[int]:
        times, parents = {}, {}
        for entry in self._proc.iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                fields = _process_fields(entry)
            except OSError:
                continue  # it has ended
            pid = int(entry.name)
            parents[pid] = int(fields[_PARENT])
            times[pid] = sum(map(int, fields[_TIMES]))
        me = os.getpid()
        for pid, ticks in times.items():
            above = pid
            while above not in (me, 0):
                above = parents.get(above, 0)
            if above == me:
                yield ticks

    def _load_average(self) -> float | None:
        try:
            return float((self._proc / "loadavg").read_text().split()[0])
        except OSError:
            return None

    def _stalled(self) -> tuple[float, float] | None:
        """Seconds in which something waited for a CPU, and the time of day of the clock that goes with them."""
        try:
            some = (self._proc / "pressure" / "cpu").read_text().split("\n", 1)[0]
            uptime = (self._proc / "uptime").read_text().split()[0]
        except OSError:
            return None
        return int(some.rpartition("total=")[2]) / 1e6, float(uptime)
