"""The dirty log of KVM, each way to keep it: what our calls take, and what the kernel's ioctls alone take in the same run.

Both sides do the same in turn, another one first each time, after the guest has written to the same pages. *Ours* is a call of
the hypervisor interface. The *kernel's* is the ioctls that such a call makes, with arguments and buffers that were ready before:
for rings, KVM_RESET_DIRTY_RINGS once their entries have been handed back. *Own* is the part of our call outside its ioctls,
by clocks around each: it holds on a machine whose load changes from one call to the next.

- **Write fault**: per page of a pass in which each write faults, less that of a pass in which none does.
- **Enable**: logging is switched on, on memory that the guest has in blocks; a log that starts full is taken once.
  **Disable**: off.
- **Harvest**: with all pages dirty, every 100th, none. **Clear**: the part of it that `manual` does apart.
- **Sparse harvest**: every 100th page of a large memory of which the host has given no more.
- **Guest speed**: pages written in a second without a log; with one that is never taken; and with one taken ten times a second.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from sterna.bench.kvm.guest import WORK_SLOT, WritingGuest, same_pages
from sterna.hypervisor.interface import DirtyLogMode
from sterna.hypervisor.kvm.dirtylog import (
    CLEAR_DIRTY_LOG,
    CLEAR_PAGES,
    GET_DIRTY_LOG,
    ClearDirtyLogArgument,
    DirtyLogArgument,
)
from sterna.hypervisor.kvm.dirtyring import RESET_DIRTY_RINGS
from sterna.hypervisor.kvm.ioctl import Argument, Descriptor, Request
from sterna.hypervisor.kvm.memslots import SET_USER_MEMORY_REGION, region_of
from sterna.memory.address import BITS_PER_WORD, bitmap_words
from sterna.memory.bitmap import Words, new_bitmap

STRIDE = 100
"""One page in so many is dirty: 1 %."""
_HARVEST_EVERY = 0.1


@dataclass(frozen=True)
class Sizes:
    """:ivar dense_bytes: memory that the host gives in advance
    :ivar sparse_bytes: memory of which it gives what is written to
    :ivar speed_seconds: for how long the guest's speed is measured
    """

    dense_bytes: int = 256 << 20
    sparse_bytes: int = 16 << 30
    rounds: int = 5
    speed_seconds: float = 1.0


QUICK = Sizes(8 << 20, 256 << 20, 2, 0.2)


@dataclass(frozen=True)
class Times:
    """Seconds, one figure a round.

    :ivar bytes: of the memory that the call was for
    :ivar own: what our calls took outside their ioctls
    """

    bytes: int
    ours: list[float] = field(default_factory=list)
    own: list[float] = field(default_factory=list)
    kernel: list[float] = field(default_factory=list)

    def enter(self, side: str, seconds: float, own: float) -> None:
        """A call of one side's.

        :param own: what ours took outside its ioctls
        """
        getattr(self, side).append(seconds)
        if side == "ours":
            self.own.append(own)

    def ms(self, which: str) -> float:
        """The median of one of them."""
        median: float = statistics.median(getattr(self, which))
        return median * 1e3

    @property
    def overhead_percent(self) -> float:
        """What our call takes outside its ioctls, of the time that it is in them."""
        return self.ms("own") / max(self.ms("ours") - self.ms("own"), 1e-6) * 100


@dataclass(frozen=True)
class ModeFigures:
    """One way to keep a dirty log.

    :ivar calls: by name
    :ivar fault_us: a write fault, by when it comes: in the first pass after logging began, and in one after a harvest
    :ivar writes: pages the guest writes in a second, by what is done with its log
    """

    mode: DirtyLogMode
    calls: Mapping[str, Times]
    fault_us: Mapping[str, float]
    writes: Mapping[str, float]


class _Ioctls:
    """The kernel's part alone, on one guest's work slot."""

    def __init__(self, guest: WritingGuest, mode: DirtyLogMode) -> None:
        self._fd = guest.vm.fd
        self._vm = guest.vm
        self._mode = mode
        self._regions = {on: region_of(guest.with_log(on)) for on in (False, True)}
        self._words = new_bitmap(guest.pages)
        self._words[:] = 0  # its memory is there
        self._get = DirtyLogArgument(WORK_SLOT, 0, self._words.ctypes.data)
        self._clears: list[tuple[Words, ClearDirtyLogArgument]] = []
        for first in range(0, guest.pages, CLEAR_PAGES):
            count = min(CLEAR_PAGES, guest.pages - first)
            words = self._words[first // BITS_PER_WORD :][: bitmap_words(count)]
            argument = ClearDirtyLogArgument(WORK_SLOT, count, first, words.ctypes.data)
            self._clears.append((words, argument))

    def switch(self, on: bool) -> float:
        """Logging on or off."""
        seconds = self._time(SET_USER_MEMORY_REGION, self._regions[on])
        return seconds + (self.harvest()[0] if on and self._mode is DirtyLogMode.MANUAL else 0.0)

    def harvest(self) -> tuple[float, float]:
        """Take the log: how long all of it took, and the clear's part."""
        if self._mode is DirtyLogMode.RING:
            self._vm.hand_back_rings()
            return self._time(RESET_DIRTY_RINGS, 0), 0.0
        get, clear = self._time(GET_DIRTY_LOG, self._get), 0.0
        if self._mode is DirtyLogMode.MANUAL:
            for words, argument in self._clears:
                if words.any():
                    clear += self._time(CLEAR_DIRTY_LOG, argument)
        return get + clear, clear

    def _time(self, request: Request, argument: Argument) -> float:
        started = time.perf_counter()
        error, _ = Descriptor.attempt(self._fd, request, argument)
        seconds = time.perf_counter() - started
        if error:
            self._fd.call(request, argument)  # says what is wrong
        return seconds


class _Calls:
    """The same by the hypervisor interface."""

    def __init__(self, guest: WritingGuest, mode: DirtyLogMode) -> None:
        self._guest = guest
        self._vm = guest.vm
        self._mode = mode
        self.found: Words = new_bitmap(guest.pages)
        self._inside = 0.0
        self.own = 0.0
        """Of the last call, the seconds outside its ioctls."""
        self._vm.fd.attempt = self._attempt  # type: ignore[method-assign]

    def _attempt(self, request: Request, argument: Argument = 0) -> tuple[int, int]:
        started = time.perf_counter()
        try:
            return Descriptor.attempt(self._vm.fd, request, argument)
        finally:
            self._inside += time.perf_counter() - started

    def _ended(self, started: float) -> float:
        seconds = time.perf_counter() - started
        self.own, self._inside = seconds - self._inside, 0.0
        return seconds

    def switch(self, on: bool) -> float:
        """Logging on or off."""
        self._inside, started = 0.0, time.perf_counter()
        self._vm.set_memory_slot(self._guest.with_log(on))
        if on and self._mode is DirtyLogMode.MANUAL:
            self._vm.harvest_dirty_log(WORK_SLOT)
        return self._ended(started)

    def harvest(self) -> tuple[float, float]:
        """Take the log, as a migration does."""
        self._inside, started = 0.0, time.perf_counter()
        self.found = self._vm.harvest_dirty_log(WORK_SLOT)
        return self._ended(started), 0.0

    def clear(self) -> tuple[float, float]:
        """Take it in two calls: how long both took, and the second's part."""
        started = time.perf_counter()
        words = self._vm.get_dirty_log(WORK_SLOT)
        self._inside, got = 0.0, time.perf_counter()
        self._vm.clear_dirty_log(WORK_SLOT, 0, self._guest.pages, words)
        return time.perf_counter() - started, self._ended(got)


def measure(mode: DirtyLogMode, sizes: Sizes, check: Callable[[], None]) -> ModeFigures:
    """Measure one way to keep the log.

    :param check: called now and then; may raise
    :raise HypervisorError: When this host's KVM cannot keep it so.
    :raise RamError: When the host cannot give the memory.
    """
    with WritingGuest(mode, sizes.dense_bytes) as guest:
        calls, fault_us = _dense(guest, mode, sizes, check)
        writes = _speeds(guest, mode, sizes, check)
    with WritingGuest(mode, sizes.sparse_bytes, huge_pages=False) as guest:
        calls["harvest, 1 % of all"] = _sparse(guest, mode, sizes, check)
    return ModeFigures(mode, calls, fault_us, writes)


def _sides(rounds: int) -> list[str]:
    """Both in each round, another one first each time."""
    return (["ours", "kernel", "kernel", "ours"] * rounds)[: 2 * rounds]


def _dense(
    guest: WritingGuest, mode: DirtyLogMode, sizes: Sizes, check: Callable[[], None]
) -> tuple[dict[str, Times], dict[str, float]]:
    names = ["enable", "harvest, all", "harvest, 1 %", "harvest, none", "disable"]
    names += ["clear, all"] if mode is DirtyLogMode.MANUAL else []
    times = {name: Times(sizes.dense_bytes) for name in names}
    passes: dict[str, list[float]] = {"plain": [], "first": [], "later": []}
    ours, kernel = _Calls(guest, mode), _Ioctls(guest, mode)
    guest.write(guest.pages)
    for side in _sides(sizes.rounds):
        check()
        who: _Calls | _Ioctls = ours if side == "ours" else kernel

        def enter(name: str, seconds: float, side: str = side) -> None:
            times[name].enter(side, seconds, ours.own)

        guest.write(guest.pages)  # blocks come back
        passes["plain"].append(guest.write(guest.pages))
        enter("enable", who.switch(True))
        passes["first"].append(guest.write(guest.pages))
        enter("harvest, all", who.harvest()[0])
        _check_found(ours, side, guest.pages, 1)
        passes["later"].append(guest.write(guest.pages))
        taken = ours.clear() if side == "ours" and mode is DirtyLogMode.MANUAL else who.harvest()
        if mode is DirtyLogMode.MANUAL:
            enter("clear, all", taken[1])
        guest.write(guest.pages // STRIDE, STRIDE)
        enter("harvest, 1 %", who.harvest()[0])
        _check_found(ours, side, guest.pages // STRIDE, STRIDE)
        enter("harvest, none", who.harvest()[0])
        enter("disable", who.switch(False))
    plain = statistics.median(passes["plain"])
    fault_us = {
        name: (statistics.median(passes[name]) - plain) / guest.pages * 1e6 for name in ("first", "later")
    }
    return times, fault_us


def _check_found(ours: _Calls, side: str, pages: int, stride: int) -> None:
    """A figure of a log that does not say what was written is none."""
    if side == "ours" and not same_pages(ours.found, pages, stride):
        raise RuntimeError(f"the dirty log does not hold the {pages} pages that were written")


def _sparse(guest: WritingGuest, mode: DirtyLogMode, sizes: Sizes, check: Callable[[], None]) -> Times:
    times = Times(sizes.sparse_bytes)
    ours, kernel = _Calls(guest, mode), _Ioctls(guest, mode)
    ours.switch(True)
    pages = guest.pages // STRIDE
    guest.write(pages, STRIDE)
    ours.harvest()
    for side in _sides(sizes.rounds):
        check()
        guest.write(pages, STRIDE)
        who: _Calls | _Ioctls = ours if side == "ours" else kernel
        times.enter(side, who.harvest()[0], ours.own)
        _check_found(ours, side, pages, STRIDE)
    return times


def _speeds(
    guest: WritingGuest, mode: DirtyLogMode, sizes: Sizes, check: Callable[[], None]
) -> dict[str, float]:
    found: dict[str, list[float]] = {"no log": [], "log": [], "harvests": []}
    ours = _Calls(guest, mode)
    for _ in range(sizes.rounds):
        check()
        guest.write(guest.pages, passes=2)
        found["no log"].append(guest.write_for(sizes.speed_seconds))
        ours.switch(True)
        guest.write(guest.pages)
        found["log"].append(guest.write_for(sizes.speed_seconds))
        found["harvests"].append(guest.write_for(sizes.speed_seconds, _HARVEST_EVERY))
        ours.switch(False)
    return {name: float(np.median(values)) for name, values in found.items()}
