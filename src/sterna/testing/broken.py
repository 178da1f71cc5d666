"""Emulated hypervisors with one fault each, for tests of whoever has to find such faults: the test bed.

Each is a subclass that is chosen when the VM is made, so the hypervisor itself looks at nothing. The faults are those that a
developer of dirty logging makes; what each is found by is told in ARCHITECTURE.md. Where a fault harms only what the guest does
in a short time, the VM extends that time until the guest has done it: a fault without an effect cannot be found.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from sterna.hypervisor.emulated.vm import EmulatedVm
from sterna.hypervisor.interface import MemorySlot
from sterna.jit.atomics import atomic_and
from sterna.jit.kernel import kernel
from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.bitmap import Words, page_numbers
from sterna.stage2.dirtylog import DirtyLog
from sterna.stage2.tlb import FlushCounters

_PREEMPTED_SECONDS = 0.002
_POLL_SECONDS = 0.01
_FILLING_TICKS = 100
"""In so many a guest has written to most of the pages that it writes to."""
_AT_MOST_SECONDS = 30.0
"""How long a guest that runs is waited for to write; one that does not in that time writes to nothing."""


@kernel()
def _clear_bits(address: int, mask: int) -> int:
    """Clear bits of the word at `address`: those of them that were set. Nothing is protected."""
    return int(atomic_and(address, ~mask) & mask)


def _take_bit(bitmap: Words, page: int) -> bool:
    """Clear a page's bit while vCPUs may be setting others: whether it was set."""
    mask = 1 << (page & 63)
    signed = mask - (1 << 64) if mask >> 63 else mask
    return bool(_clear_bits(bitmap.ctypes.data + 8 * (page >> 6), signed))


class _WatchedVm(EmulatedVm):
    """One that can wait for its guest."""

    def await_guest(self, condition: Callable[[], bool]) -> None:
        """Return when the guest has made a condition true, or when no vCPU runs that could."""
        deadline = time.monotonic() + _AT_MOST_SECONDS
        while any(cpu.running for cpu in self.cpus) and not condition():
            if time.monotonic() > deadline:
                return
            time.sleep(_PREEMPTED_SECONDS)

    def await_more(self, slot: int, known: Words) -> None:
        """Return when a page is written that `known` has not."""
        log = self._log(slot)
        self.await_guest(lambda: bool((log.peek() & ~known).any()))


class _NoFlush:
    """A flush that is counted and not made."""

    def __init__(self) -> None:
        self.counters = FlushCounters()

    def flush_remote_tlbs(self) -> None:
        """CPUs go on with what their TLBs hold."""
        self.counters.flushes += 1


class _SkipsTlbFlush(_WatchedVm):
    """Pages are write-protected in the tables only: a CPU whose TLB holds an older entry writes on unseen."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.flush = _NoFlush()

    def _start_log(self, slot: MemorySlot) -> None:
        while self.tlb_sizing.active:  # its flushes would make good for those that are left out
            time.sleep(_POLL_SECONDS)
        # The last of them may have been a moment ago: an empty TLB has no older entries.
        ticks = self._ticks()
        self.await_guest(lambda: self._ticks() >= ticks + _FILLING_TICKS)
        super()._start_log(slot)

    def _ticks(self) -> int:
        """How often the vCPUs have gone to sleep until their timer's next tick."""
        return sum(int(cpu.record[0]["wfis"]) for cpu in self.cpus)


class _ForgetfulLog(DirtyLog):
    """One page, the first that is written, becomes writable without its bit being set."""

    _forgotten = -1

    def _forget(self) -> None:
        if self._forgotten < 0:
            self._forgotten = next(iter(page_numbers(self._bitmap).tolist()), -1)
        if self._forgotten >= 0:
            _take_bit(self._bitmap, self._forgotten)

    def get(self) -> Words:
        self._forget()
        return super().get()

    def peek(self) -> Words:
        self._forget()
        return super().peek()


class _ForgetsMark(EmulatedVm):
    log_class = _ForgetfulLog


class _ClearsLate(_WatchedVm):
    """The log is copied first and cleared afterwards: what is written between the two is lost."""

    def get_dirty_log(self, slot: int) -> Words:
        out = self._log(slot).peek()
        # The thread loses its CPU there, for long enough to matter.
        time.sleep(_PREEMPTED_SECONDS)
        self.await_more(slot, out)
        super().get_dirty_log(slot)
        return out


class _ShortLog(DirtyLog):
    """The slot's last page is never protected: each range ends one page too early."""

    def _protect_all(self) -> None:
        self._stage2.protect(self._ipa, (self._pages - 1) << PAGE_SHIFT)

    def get(self) -> Words:
        last = self._pages - 1
        written = _take_bit(self._bitmap, last)
        out = super().get()
        if written:
            out[last >> 6] |= 1 << (last & 63)
        return out


class _ProtectsShort(_WatchedVm):
    """That page is written between one harvest and the next, however short the pass between was."""

    log_class = _ShortLog

    def _last_page(self, slot: int) -> bytes:
        there = self._map.slot(slot)
        end = there.offset + there.size
        return there.block.data[end - PAGE_SIZE : end].tobytes()

    def get_dirty_log(self, slot: int) -> Words:
        before = self._last_page(slot)
        self.await_guest(lambda: self._last_page(slot) != before)
        return super().get_dirty_log(slot)


class _ForgetsOffset(EmulatedVm):
    """CNTVOFF is set for a guest that starts, and not for one that goes on: it reads the host's own counter."""

    def set_counter(self, value: int) -> None:
        if value == 0:
            super().set_counter(value)


class _DropsLastPass(_WatchedVm):
    """The last harvest of the dirty log, with all vCPUs stopped, finds nothing. After each other harvest there is something for
    the next one.
    """

    def get_dirty_log(self, slot: int) -> Words:
        words = super().get_dirty_log(slot)
        if any(cpu.running for cpu in self.cpus):
            self.await_more(slot, words)
        else:
            words[:] = 0
        return words


class _NeverRebuilds(EmulatedVm):
    """Blocks that were dissolved stay in pages."""

    def _stop_log(self, slot: MemorySlot) -> None:
        super()._stop_log(slot)
        self.stage2.state[0]["max_leaf"] = PAGE_SIZE


_BROKEN: Mapping[str, type[EmulatedVm]] = {
    "skip-tlb-flush": _SkipsTlbFlush,
    "forget-mark": _ForgetsMark,
    "clear-after-copy": _ClearsLate,
    "protect-short": _ProtectsShort,
    "forget-counter-offset": _ForgetsOffset,
    "drop-last-pass": _DropsLastPass,
    "no-rebuild": _NeverRebuilds,
}

BREAKAGES = tuple(_BROKEN)


def broken_vm(breakage: str) -> type[EmulatedVm]:
    """The VM with a breakage, one of `BREAKAGES`."""
    return _BROKEN[breakage]
