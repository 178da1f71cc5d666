"""One emulated CPU: a Unicorn engine behind our stage 2. Which CPU that is, an architecture says."""

import ctypes
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic

import numpy as np
from numpy.typing import NDArray
from unicorn import UC_HOOK_INTR, UC_PROT_ALL, Uc, UcError
from unicorn.unicorn_py3.unicorn import uclib

from sterna.hypervisor.emulated.guestmode import NO_ABORT, on_exception
from sterna.hypervisor.emulated.native import SYSTEM_WORDS, VCPU
from sterna.hypervisor.interface import HypervisorError, MmioDevice, StateT, SystemEvent
from sterna.hypervisor.traits import Trait
from sterna.memory.address import PAGE_SIZE, Ipa
from sterna.memory.ram import RamBlock
from sterna.stage2.tables import Stage2

_LIBC = ctypes.CDLL(None, use_errno=True)
_POLLIN = 1
_COUNTER_MASK = (1 << 64) - 1
VMID = 1


def _address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    if value is None:
        raise HypervisorError("a C function that the emulation needs has no address")
    return value


class Engine(ABC, Generic[StateT]):
    """A CPU whose MMU walks `stage2`, and which guest mode runs.

    :cvar model: Unicorn's architecture, mode and CPU, and the CPU's name
    :cvar ipa_bits: width of a guest physical address
    :cvar counter_hz: frequency of its counter, which Unicorn derives from CLOCK_MONOTONIC
    :cvar traits: what a guest may rely on: the CPU is the same everywhere; elsewhere its counter may not be
    :cvar exceptions: those of a guest's own, which it has no vectors for, by the numbers that guest mode has for them
    :cvar numbers: fields of `VCPU` that say how guest mode reads its registers
    :cvar system: Unicorn's structures for the system registers that guest mode reads, in up to `SYSTEM_WORDS` words, of which the
        last is the value; by the names that `VCPU` has for them
    :cvar counter_offset: that of CNTVOFF without the value, as its binding for Python has it
    :ivar uc: the Unicorn engine
    :ivar record: one `VCPU` record, for compiled code
    :ivar failure: what a device's callback raised, to be raised again by whoever runs the CPU

    :raise HypervisorError: When Unicorn refuses.
    """

    model: ClassVar[tuple[int, int, int, str]]
    ipa_bits: ClassVar[int]
    counter_hz: ClassVar[int]
    traits: ClassVar[Sequence[Trait]]
    exceptions: ClassVar[Mapping[int, str]]
    numbers: ClassVar[Mapping[str, int]]
    system: ClassVar[Mapping[str, Sequence[int]]]
    counter_offset: ClassVar[tuple[int, ...]]

    def __init__(self, index: int, stage2: Stage2, event_fd: int) -> None:
        self.failure: BaseException | None = None
        architecture, mode, cpu, name = self.model
        try:
            self.uc = Uc(architecture, mode)
            self.uc.ctl_set_cpu_model(cpu)
            # Unicorn's default of 1 KiB would take four TLB entries for a page.
            self.uc.ctl_set_page_size(PAGE_SIZE)
            self.uc.mem_map_ptr(stage2.root_pa, stage2.pool_size, UC_PROT_ALL, stage2.pool_hva)
        except UcError as error:
            raise HypervisorError(f"vCPU {index}: the emulator refuses a {name}: {error}") from error
        self._stage2 = stage2
        self.record: NDArray[Any] = np.zeros(1, dtype=VCPU)
        self._fill_record(index, event_fd)
        # The hook's data: a pointer to the record's address.
        self._hook_data = np.array([self.record.ctypes.data], dtype=np.int64)
        self._hook = ctypes.c_size_t()
        status = uclib.uc_hook_add(
            self.uc._uch,
            ctypes.byref(self._hook),
            UC_HOOK_INTR,
            ctypes.c_void_p(on_exception.address),
            ctypes.c_void_p(self._hook_data.ctypes.data),
            ctypes.c_uint64(1),
            ctypes.c_uint64(0),
        )
        if status:
            raise HypervisorError(f"vCPU {index}: no exception hook, Unicorn error {status}")
        self._set_up(index, stage2.root_pa)

    # -- what an architecture adds -------------------------------------------------------------------------------------

    @abstractmethod
    def _set_up(self, index: int, root_pa: int) -> None:
        """Make it vCPU `index` of a guest behind stage 2, whose tables are at `root_pa`, with `NO_ABORT` in its HPFAR. It has
        translated nothing yet.
        """

    @abstractmethod
    def save(self, counter: int, powered_off: bool) -> StateT:
        """All registers the guest can see."""

    @abstractmethod
    def restore(self, state: StateT) -> None:
        """Set all registers; ids of system registers that Unicorn does not keep are passed over."""

    @abstractmethod
    def started(self, reset: StateT, entry: int, context: int) -> StateT:
        """What another CPU's call makes of one: at the entry, all else as after a reset."""

    @abstractmethod
    def hypercall(self, cpus: Sequence[Any], caller: Any) -> SystemEvent | None:
        """Serve this vCPU's call: what the guest has done to its VM by it, if it has."""

    @abstractmethod
    def undefined(self, read: Callable[[Ipa, int], bytes | None]) -> str | None:
        """Of an instruction that Unicorn calls invalid, what it is; None when it is valid, and the guest can go on."""

    # -- what all have -------------------------------------------------------------------------------------------------

    @classmethod
    def physical_counter(cls) -> int:
        """The counter of every such CPU, without an offset."""
        return time.monotonic_ns() * cls.counter_hz // 1_000_000_000

    @property
    def pc(self) -> int:
        """Address of the next instruction. Emulation is stopped."""
        return int(self.uc.reg_read(self.numbers["pc_register"]))

    def _write(self, register: tuple[int, ...], value: int) -> None:
        """Set a system register."""
        self.uc.reg_write(self.numbers["system_register"], (*register, value))

    def set_counter_offset(self, offset: int) -> None:
        """CNTVOFF: the virtual counter is the physical one less this. Emulation is stopped."""
        self._write(self.counter_offset, offset & _COUNTER_MASK)

    def _fill_record(self, index: int, event_fd: int) -> None:
        record = self.record[0]
        record["address"] = self.record.ctypes.data
        record["uc"] = self.uc._uch.value
        record["index"] = index
        record["stage2"] = self._stage2.state.ctypes.data
        record["slots"] = self._stage2.slots.ctypes.data
        record["tables"] = self._stage2.tables.ctypes.data
        record["table_words"] = self._stage2.tables.size
        record["pollfd"] = event_fd | _POLLIN << 32
        for name in ("uc_emu_start", "uc_emu_stop", "uc_reg_read", "uc_reg_write", "uc_ctl"):
            record[name] = _address(getattr(uclib, name))
        for name in ("ppoll", "read", "sched_yield"):
            record[name] = _address(getattr(_LIBC, name))
        for name, number in self.numbers.items():
            record[name] = number
        for name, words in self.system.items():
            skipped = SYSTEM_WORDS - len(words)
            record["system_at"] = 8 * skipped
            for i, word in enumerate(words, start=skipped):
                record[f"{name}_{i}"] = word
        record["hpfar_4"] = NO_ABORT

    def map_ram(self, pa: int, block: RamBlock) -> None:
        """Give the CPU a RAM block as physical memory at `pa`. Emulation is stopped."""
        try:
            self.uc.mem_map_ptr(pa, block.size, UC_PROT_ALL, block.hva)
        except UcError as error:
            raise HypervisorError(f"RAM block {block.name!r} cannot be mapped at {pa:#x}: {error}") from error

    def unmap_ram(self, pa: int, block: RamBlock) -> None:
        """Take a RAM block away, with what was translated from its code. Emulation is stopped."""
        self.uc.mem_unmap(pa, block.size)
        # Unicorn itself discards what it finds at this address by the guest's translation.
        self.uc.ctl_flush_tb()

    def map_device(self, pa: int, size: int, device: MmioDevice, cpu: int, stop: Callable[[], None]) -> None:
        """Put a device at physical address `pa`. What it raises stops the CPU by `stop` and is kept in `failure`."""

        def read(_uc: Any, offset: int, width: int, _data: Any) -> int:
            try:
                return device.mmio_read(offset, width, cpu)
            except BaseException as error:  # it must not unwind into the emulator
                self.failure = error
                stop()
                return 0

        def write(_uc: Any, offset: int, width: int, value: int, _data: Any) -> None:
            try:
                device.mmio_write(offset, width, value, cpu)
            except BaseException as error:  # it must not unwind into the emulator
                self.failure = error
                stop()

        try:
            self.uc.mmio_map(pa, size, read, None, write, None)
        except UcError as error:
            raise HypervisorError(f"a device cannot be mapped at {pa:#x}: {error}") from error
