"""A VM of this host's KVM with one program, which writes to pages: on how many, how far apart, how often."""

import struct
import threading
import time
from typing import Any, cast

import numpy as np

from sterna.arch.x86_64 import longmode
from sterna.arch.x86_64.state import MSR_KVM_SYSTEM_TIME
from sterna.host.closing import Closing
from sterna.hypervisor.accelerator import ACCELERATORS, open_vm
from sterna.hypervisor.interface import DirtyLogMode, ExitReason, MemorySlot, SlotFlags, StatefulVcpu
from sterna.hypervisor.kvm.vm import KvmVm
from sterna.machine.board import BOARDS
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.bitmap import Words
from sterna.memory.ram import RamBlock

WORK_SLOT = 1
_CODE, _TABLES, _PROGRAM_BYTES = Ipa(0x1000_0000), Ipa(0x1001_0000), 1 << 20
_END = Ipa(0x0A00_0000)
_WORK = Ipa(0x1_0000_0000)
_GIB = 1 << 30
_POLL_SECONDS = 0.001

# p0: address of the first page, p1: pages, p2: the value of the first pass, p3: bytes between two pages, p4: passes. Each
# pass writes a number that is one more; a store to p5 ends the program.
_X86 = bytes.fromhex(
    "4989fa 4989f3"  # mov r10, rdi; mov r11, rsi
    "418912 4901ca 49ffcb 75f5"  # mov [r10], edx; add r10, rcx; dec r11; jnz (mov [r10])
    "ffc2 49ffc8 75e8"  # inc edx; dec r8; jnz (start)
    "418911 ebfe"  # mov [r9], edx; jmp .
)
_X86_PARAMETERS = ("rdi", "rsi", "rdx", "rcx", "r8", "r9")
_ARM64 = struct.pack(
    "<11I",
    *(0xAA0003EA, 0xAA0103EB),  # mov x10, x0; mov x11, x1
    # str w2, [x10]; add x10, x10, x3; subs x11, x11, #1; b.ne (str)
    *(0xB9000142, 0x8B03014A, 0xF100056B, 0x54FFFFA1),
    *(0x11000442, 0xF1000508, 0x54FFFF01),  # add w2, w2, #1; subs x8, x8, #1; b.ne (start)
    *(0xB9000122, 0x14000000),  # str w2, [x9]; b .
)
_ARM64_PARAMETERS = (0, 1, 2, 3, 8, 9)


class _End:
    """The device that ends the program."""

    def __init__(self, guest: "WritingGuest") -> None:
        self._guest = guest

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        return 0

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        self._guest.cpu.kick()


class WritingGuest(Closing):
    """A VM with one vCPU and a slot of memory that the program writes to.

    :ivar vm: the VM
    :ivar slot: the memory that is written to; not logged at first
    :ivar pages: how many it has

    :param size: of that memory, in bytes
    :param huge_pages: False where it must cost no more than the pages that are written to
    :raise HypervisorError: When this host cannot have the VM.
    :raise RamError: When it cannot have the memory.
    """

    def __init__(self, mode: DirtyLogMode, size: int, *, huge_pages: bool = True) -> None:
        self._arch = BOARDS.get(ACCELERATORS.get("kvm").board).arch
        self._value = 0
        self.vm = cast(KvmVm, open_vm("kvm", self._arch, dirty_log=mode))
        self.pages = size >> self.vm.log_page_bits
        self._programs = RamBlock("programs", _PROGRAM_BYTES)
        self._block = RamBlock("work", size, huge_pages=huge_pages, populated=huge_pages)
        self.vm.set_memory_slot(MemorySlot(0, _CODE, _PROGRAM_BYTES, self._programs))
        self.slot = MemorySlot(WORK_SLOT, _WORK, size, self._block)
        self.vm.set_memory_slot(self.slot)
        self.vm.add_mmio(_END, PAGE_SIZE, _End(self))
        self.cpu = self.vm.create_vcpu(0)
        code = _ARM64 if self._arch == "arm64" else _X86
        self._programs.view[: len(code)] = code
        if self._arch == "x86_64":
            tables = longmode.page_tables(_TABLES, (_WORK + size - 1) // _GIB + 1)
            at = _TABLES - _CODE
            self._programs.view[at : at + len(tables)] = tables

    def with_log(self, on: bool) -> MemorySlot:
        """The slot, logged or not."""
        flags = SlotFlags.LOG_DIRTY_PAGES if on else SlotFlags.NONE
        return MemorySlot(WORK_SLOT, _WORK, self.slot.size, self._block, flags=flags)

    def write(self, pages: int, stride: int = 1, passes: int = 1) -> float:
        """Let the guest write to so many pages, to each `stride`-th, so many times over: seconds that it took."""
        self._begin(pages, stride, passes)
        return self._run()

    def write_for(self, seconds: float, harvest_every: float | None = None) -> float:
        """Let the guest write to all pages again and again: pages it wrote in a second.

        :param harvest_every: seconds from one harvest of the log to the next; None takes none
        """
        first = self._value + 1
        self._begin(self.pages, 1, 1 << 30)
        thread = threading.Thread(target=self._run)
        started = time.perf_counter()
        thread.start()
        harvests = 0
        while (now := time.perf_counter() - started) < seconds:
            if harvest_every is not None and now >= (harvests + 1) * harvest_every:
                self.vm.harvest_dirty_log(WORK_SLOT)
                harvests += 1
            time.sleep(_POLL_SECONDS)
        self.cpu.kick()
        thread.join()
        elapsed = time.perf_counter() - started
        newest = self.words()
        self._value = int(newest.max())
        return float(np.sum(np.maximum(newest - (first - 1), 0), dtype=np.float64)) / elapsed

    def words(self) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        """The number that each page holds: shape (pages,)."""
        return self._block.data.view(np.uint32).reshape(self.pages, -1)[:, 0].astype(np.int64)

    def _begin(self, pages: int, stride: int, passes: int) -> None:
        assert 0 < pages * stride <= self.pages
        parameters = (_WORK, pages, self._value + 1, stride * PAGE_SIZE, passes, _END)
        self._value += passes if passes < 1 << 30 else 0
        vcpu = cast(StatefulVcpu[Any], self.cpu)
        state = vcpu.get_state()
        if self._arch == "arm64":
            state.begin(_CODE)
            for number, value in zip(_ARM64_PARAMETERS, parameters, strict=True):
                state.x[number] = value
        else:
            longmode.start(state, _CODE, 0, _TABLES, 0)
            state.msrs[MSR_KVM_SYSTEM_TIME] = 0  # no time record, which the kernel would write
            state.regs |= dict(zip(_X86_PARAMETERS, parameters, strict=True))
        vcpu.set_state(state)

    def _run(self) -> float:
        started = time.perf_counter()
        leaving = self.cpu.run()
        elapsed = time.perf_counter() - started
        if leaving.reason is not ExitReason.INTR:
            raise RuntimeError(leaving.detail)
        return elapsed

    def close(self) -> None:
        """Free the VM and its memory."""
        self.vm.close()
        self._programs.close()
        self._block.close()


def same_pages(words: Words, pages: int, stride: int) -> bool:
    """Whether exactly each `stride`-th of the first `pages` * `stride` pages is set."""
    expected = np.zeros(words.size * 64, dtype=np.uint8)
    expected[: pages * stride : stride] = 1
    return bool(np.array_equal(np.packbits(expected, bitorder="little").view(np.uint64), words))
