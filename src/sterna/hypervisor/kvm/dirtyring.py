"""The dirty log as one ring per vCPU (Documentation/virt/kvm/api.rst, 8.29)."""

import ctypes
import mmap
import platform
import threading
from collections.abc import Callable
from typing import Annotated, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sterna.hypervisor.interface import HypervisorError, MemorySlot, Unsupported
from sterna.hypervisor.kvm.dirtylog import LOG_PAGE_SHIFT
from sterna.hypervisor.kvm.ioctl import Descriptor, io
from sterna.hypervisor.kvm.system import Capability, capability_of, enable
from sterna.jit.kernel import STRIDED, kernel
from sterna.memory.bitmap import Words, new_bitmap, set_bits

RESET_DIRTY_RINGS = io("KVM_RESET_DIRTY_RINGS", 0xC7)

LARGEST_RING = 65536
"""Entries. A page takes one, and an instruction that the kernel emulates may take many at once."""

_PAGE_OFFSET = 64  # KVM_DIRTY_LOG_PAGE_OFFSET: where a vCPU's descriptor maps its ring, in host pages
_DIRTY, _RESET = 1, 2
_FLAGS, _NEW = np.uint32(_DIRTY | _RESET), np.uint32(_DIRTY)
_CHUNK = 8192

Flags: TypeAlias = Annotated[NDArray[np.uint32], STRIDED]
Slots: TypeAlias = Annotated[NDArray[np.uint32], STRIDED]
Offsets: TypeAlias = Annotated[NDArray[np.uint64], STRIDED]


class DirtyGfn(ctypes.Structure):
    """struct kvm_dirty_gfn"""

    _fields_ = (("flags", ctypes.c_uint32), ("slot", ctypes.c_uint32), ("offset", ctypes.c_uint64))


def _make_fence() -> Callable[[], None]:
    """What keeps loads and stores before it from passing those behind it. Where the hardware keeps the order of loads among
    themselves and of stores behind loads, as x86 does, nothing.
    """
    if platform.machine() == "x86_64":
        return lambda: None
    numbers = {"aarch64": 283}
    syscall = ctypes.CDLL(None, use_errno=True).syscall
    number = numbers[platform.machine()]
    register, expedited = 1 << 4, 1 << 3  # membarrier(2): MEMBARRIER_CMD_(REGISTER_)PRIVATE_EXPEDITED
    if syscall(number, register, 0, 0) != 0:
        raise Unsupported("membarrier(2) is missing, which reading a dirty ring on this CPU needs")

    def fence() -> None:
        syscall(number, expedited, 0, 0)

    return fence


def _count_new_twin(flags: NDArray[np.uint32]) -> int:
    old = flags & _FLAGS != _NEW
    return int(np.argmax(old)) if old.any() else old.size


@kernel(twin=_count_new_twin)
def _count_new(flags: Flags) -> int:
    """How many entries from the first on the kernel has written and nobody has taken."""
    for n in range(flags.size):
        if flags[n] & _FLAGS != _NEW:
            return n
    return flags.size


def _mark_twin(slots: Slots, offsets: Offsets, slot: int, words: Words, pages: int) -> int:
    of_slot = slots == slot
    set_bits(words, offsets[of_slot & (offsets < pages)])
    return int(np.count_nonzero(of_slot))


@kernel(twin=_mark_twin)
def _mark(slots: Slots, offsets: Offsets, slot: int, words: Words, pages: int) -> int:
    """Set the bits of one slot's entries, as far as they are in its `pages` pages: how many entries are the slot's."""
    count = 0
    for n in range(slots.size):
        if slots[n] == slot:
            count += 1
            page = offsets[n]
            if page < np.uint64(pages):
                words[np.intp(page >> np.uint64(6))] |= np.uint64(1) << (page & np.uint64(63))
    return count


class DirtyRing:
    """One vCPU's ring. Entries are taken in order, each once.

    :param vcpu: its descriptor
    """

    def __init__(self, vcpu: Descriptor, entries: int, fence: Callable[[], None]) -> None:
        self._mapping = mmap.mmap(
            vcpu.number,
            entries * ctypes.sizeof(DirtyGfn),
            mmap.MAP_SHARED,
            offset=_PAGE_OFFSET * mmap.PAGESIZE,
        )
        # Columns of an array of struct kvm_dirty_gfn.
        halves = np.frombuffer(self._mapping, dtype=np.uint32).reshape(entries, -1)
        self._flags: NDArray[np.uint32] = halves[:, 0]
        self._slots: NDArray[np.uint32] = halves[:, 1]
        self._offsets: NDArray[np.uint64] = halves[:, 2:].view(np.uint64)[:, 0]
        self._fence = fence
        self._next = 0

    def take(self, mark: Callable[[Slots, Offsets], None]) -> None:
        """Hand the new entries, oldest first, to `mark`, as slots and page numbers in them, and then back to the kernel.

        Their pages are protected again by RESET_DIRTY_RINGS, which reads the rest of each entry.
        """
        while True:
            at = self._next % self._flags.size
            count = _count_new(self._flags[at : at + _CHUNK])
            if count == 0:
                return
            self._fence()  # the entries' contents after their flags
            part = slice(at, at + count)
            mark(self._slots[part], self._offsets[part])
            self._fence()  # before the kernel may use them anew
            self._flags[part] = _RESET
            self._next += count

    def close(self) -> None:
        """Unmap it."""
        del self._flags, self._slots, self._offsets
        self._mapping.close()


class RingLog:
    """The rings of a VM's vCPUs, and the pages they have told of that nobody has harvested yet.

    To be made before the VM has vCPUs and slots.

    :param entries: of each ring, a power of two
    :raise Unsupported: When the kernel has no rings, or none of this size.
    """

    def __init__(self, vm: Descriptor, entries: int = LARGEST_RING) -> None:
        capability = (
            Capability.DIRTY_LOG_RING if platform.machine() == "x86_64" else Capability.DIRTY_LOG_RING_ACQ_REL
        )
        largest = capability_of(vm, capability) // ctypes.sizeof(DirtyGfn)
        if not largest:
            raise Unsupported(f"this kernel's KVM lacks KVM_CAP_{capability.name}: no dirty rings")
        if entries > largest:
            raise Unsupported(f"a dirty ring of {entries} entries: this kernel's has at most {largest}")
        enable(vm, capability, entries * ctypes.sizeof(DirtyGfn))
        if capability is Capability.DIRTY_LOG_RING_ACQ_REL:
            # arm64's KVM takes a slot for logged when it has a bitmap: without one, a write maps its whole block writable.
            # All that is ever logged there is what its own interrupt translation tables write, which no guest of ours has.
            if not capability_of(vm, Capability.DIRTY_LOG_RING_WITH_BITMAP):
                raise Unsupported(
                    "this kernel's KVM lacks KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP: its dirty rings lose writes"
                )
            enable(vm, Capability.DIRTY_LOG_RING_WITH_BITMAP, 0)
        self._vm = vm
        self._size = entries
        self._fence = _make_fence()
        self._lock = threading.Lock()
        self._rings: list[DirtyRing] = []
        self._pending: dict[int, Words] = {}
        self._pages: dict[int, int] = {}

    def add_vcpu(self, vcpu: Descriptor) -> None:
        """Map the ring of a new vCPU."""
        with self._lock:
            self._rings.append(DirtyRing(vcpu, self._size, self._fence))

    def start(self, slot: MemorySlot) -> None:
        """The slot is going to be logged."""
        with self._lock:
            self._drain()
            self._pages[slot.slot] = slot.size >> LOG_PAGE_SHIFT
            self._pending[slot.slot] = new_bitmap(slot.size >> LOG_PAGE_SHIFT)

    def stop(self, slot: MemorySlot) -> None:
        """The slot is logged no more: what its log holds is gone."""
        with self._lock:
            self._drain()
            self._pending.pop(slot.slot, None)

    def drain(self) -> None:
        """Empty the rings, so that vCPUs that stand still for a full one can go on."""
        with self._lock:
            self._drain()

    def hand_back(self) -> None:
        """The first half of a harvest: take all entries into the pending logs. Their pages are protected again by
        KVM_RESET_DIRTY_RINGS.
        """
        with self._lock:
            self._collect()

    def peek(self, slot: MemorySlot) -> Words:
        """A copy of the slot's log. Its pages stay writable until the harvest resets the rings.

        :raise HypervisorError: When the slot is not logged.
        """
        with self._lock:
            self._collect()
            return self._log(slot).copy()

    def harvest(self, slot: MemorySlot) -> Words:
        """Take the slot's log. Its pages are protected again: nobody may read pages of the log before this returns.

        :raise HypervisorError: When the slot is not logged.
        """
        with self._lock:
            words = self._log(slot)
            self._drain()  # into these words, too
            self._pending[slot.slot] = new_bitmap(self._pages[slot.slot])
            return words

    def _log(self, slot: MemorySlot) -> Words:
        if slot.slot not in self._pending:
            raise HypervisorError(f"memory slot {slot.slot}: its dirty log is off")
        return self._pending[slot.slot]

    def _drain(self) -> None:
        self._collect()
        self._vm.call(RESET_DIRTY_RINGS)

    def _collect(self) -> None:
        for ring in self._rings:
            ring.take(self._mark)

    def _mark(self, slots: Slots, offsets: Offsets) -> None:
        # A guest writes to one slot most of the time.
        first = slots[0]
        if self._mark_slot(first, slots, offsets) < slots.size:
            for number in np.unique(slots):
                if number != first:
                    self._mark_slot(number, slots, offsets)

    def _mark_slot(self, number: np.uint32, slots: Slots, offsets: Offsets) -> int:
        words = self._pending.get(int(number))
        if words is None:  # logged no more
            return int(np.count_nonzero(slots == number))
        return _mark(slots, offsets, int(number), words, self._pages[int(number)])

    def close(self) -> None:
        """Unmap the rings."""
        with self._lock:
            for ring in self._rings:
                ring.close()
            self._rings.clear()
