"""How much memory, and how many processors, this process may still take of its host.

The host's own figures are those of everybody on it. A process in a control group gets what the group has left, and the group
what each group above it has left; who takes more is killed. So the smallest of them counts. Sources: proc(5), cgroups(7), and
the kernel's documentation of both versions, admin-guide/cgroup-v1/memory.rst and admin-guide/cgroup-v2.rst.

- *Host*: MemAvailable, which is what can be had without swapping.
- *Version 2*: the lower of ``memory.max`` (beyond it processes are killed) and ``memory.high`` (beyond it they are slowed down),
  less ``memory.current``.
- *Version 1*: ``memory.limit_in_bytes`` less ``memory.usage_in_bytes``; and the same of memory and swap together
  (``memory.memsw``), where the kernel counts swap. Limits of groups above that cannot be seen from here are in ``memory.stat``
  (``hierarchical_*_limit``).
- Of what a group uses, pages of files that were not used lately (``inactive_file``) are given back to who needs memory, so
  they are left too. Swap is not memory that is left: what takes it is slow.
- *Processors*: those that this process may run on (sched_setaffinity(2), which cpusets act through), or fewer where a group
  may use no more time than that (``cpu.max``; ``cpu.cfs_quota_us``).
"""

import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/")
"""Where /proc and the control groups' file systems are looked for."""


@dataclass(frozen=True)
class Bound:
    """The most memory that can be had.

    :ivar by: who gives no more
    """

    size: int
    by: str


@dataclass(frozen=True)
class _Group:
    """A control group of one controller that this process is in, itself or by a group below."""

    path: Path
    unified: bool

    def read(self, name: str) -> str:
        """A file's text; empty where the kernel, or this group, has none such."""
        try:
            return (self.path / name).read_text(encoding="ascii")
        except (OSError, ValueError):
            return ""

    def number(self, name: str) -> int | None:
        """A file's number, None where there is none or it is no bound (``max``)."""
        text = self.read(name).strip()
        return int(text) if text.isdecimal() else None

    def figures(self) -> dict[str, int]:
        return {
            key: int(value)
            for key, _, value in (line.partition(" ") for line in self.read("memory.stat").splitlines())
            if value.isdecimal()
        }

    def left(self) -> Iterator[int]:
        """What it has left, by each of its bounds."""
        figures = self.figures()
        if self.unified:
            limits = [self.number("memory.max"), self.number("memory.high")]
            kinds = [(limits, "memory.current", "inactive_file")]
        else:
            kinds = [
                (
                    [self.number(f"{name}.limit_in_bytes"), figures.get(f"hierarchical_{word}_limit")],
                    f"{name}.usage_in_bytes",
                    "total_inactive_file",
                )
                for name, word in (("memory", "memory"), ("memory.memsw", "memsw"))
            ]
        for limits, usage_name, idle_name in kinds:
            usage = self.number(usage_name)
            if usage is not None:
                idle = figures.get(idle_name, 0)
                yield from (max(0, limit - usage + min(idle, usage)) for limit in limits if limit is not None)

    def most(self, swap: int) -> Iterator[int]:
        """What its processes can have at most, some of it in swap.

        :param swap: the host's
        """
        limit = self.number("memory.max" if self.unified else "memory.limit_in_bytes")
        if limit is not None:
            allowed = self.number("memory.swap.max") if self.unified else None
            yield limit + (swap if allowed is None else min(swap, allowed))
        both = None if self.unified else self.number("memory.memsw.limit_in_bytes")
        if both is not None:
            yield both

    def cpus(self) -> Iterator[float]:
        """How many processors' time it may use."""
        if self.unified:
            words = self.read("cpu.max").split()
        else:
            words = [self.read(f"cpu.cfs_{name}_us").strip() for name in ("quota", "period")]
        if len(words) == 2 and all(word.isdecimal() and int(word) for word in words):
            yield int(words[0]) / int(words[1])


def available_bytes() -> int | None:
    """Memory that this process may still take without harm to itself and others; None when the host does not tell."""
    left = [size for group in _groups("memory") for size in group.left()]
    host = _meminfo().get("MemAvailable")
    return min(left if host is None else [host, *left], default=None)


def most_bytes() -> Bound | None:
    """The most memory that this process could ever have; None when the host does not tell."""
    host = _meminfo()
    bounds = [Bound(host["MemTotal"], "this host")] if "MemTotal" in host else []
    for group in _groups("memory"):
        bounds += [
            Bound(size, f"the control group {group.path}") for size in group.most(host.get("SwapTotal", 0))
        ]
    return min(bounds, key=lambda bound: bound.size, default=None)


def usable_cpus() -> int:
    """How many threads of this process can run at once, at least 1."""
    quotas = [quota for group in _groups("cpu") for quota in group.cpus()]
    return max(1, math.ceil(min([len(os.sched_getaffinity(0)), *quotas])))


def _meminfo() -> dict[str, int]:
    """The figures of /proc/meminfo in bytes."""
    try:
        text = (ROOT / "proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return {}
    return {key: int(size) << 10 for key, size in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}


def _groups(controller: str) -> Iterator[_Group]:
    """The groups of this process for a controller, of both versions, each with those above it as far as they can be seen."""
    try:
        # Groups and what is mounted elsewhere may have any bytes for a name.
        memberships, mounts = (
            [line for line in os.fsdecode((ROOT / "proc/self" / name).read_bytes()).split("\n") if line]
            for name in ("cgroup", "mountinfo")
        )
    except OSError:
        return
    # "hierarchy:controllers:path"; version 2 has hierarchy 0 and names no controllers.
    paths = {
        controllers: path
        for _, controllers, path in (line.split(":", 2) for line in memberships)
        if not controllers or controller in controllers.split(",")
    }
    for line in mounts:
        # "id parent device root place options [optional...] - type source options"
        fields, _, kind = line.partition(" - ")
        words, kind_words = fields.split(), kind.split()
        if len(words) < 5 or len(kind_words) < 3:
            continue
        unified = kind_words[0] == "cgroup2"
        if not unified and (kind_words[0] != "cgroup" or controller not in kind_words[2].split(",")):
            continue
        top, place = (_unescaped(word) for word in words[3:5])
        for controllers, path in paths.items():
            if unified == (not controllers):
                yield from _upwards(ROOT / place.lstrip("/"), top, path, unified)


def _upwards(place: Path, top: str, path: str, unified: bool) -> Iterator[_Group]:
    """A group and those above it.

    :param place: where a tree of groups is mounted
    :param top: which group is mounted there
    :param path: the group; one that is not below `top` (in a container that sees the host's names) is taken for `top` itself
    """
    below = Path(path).relative_to(top) if Path(path).is_relative_to(top) else Path()
    if ".." in below.parts:
        below = Path()
    group = place / below
    while True:
        yield _Group(group, unified)
        if group == place:
            return
        group = group.parent


def _unescaped(word: str) -> str:
    """A word of mountinfo, in which blanks and backslashes are octal."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), word)
