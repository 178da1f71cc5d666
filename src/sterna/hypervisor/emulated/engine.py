"""One emulated CPU: a Unicorn engine set up as a Cortex-A15 behind our stage 2."""

import ctypes
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from unicorn import UC_ARCH_ARM, UC_HOOK_INTR, UC_MODE_ARM, UC_PROT_ALL, Uc, UcError
from unicorn import arm_const as arm
from unicorn.unicorn_py3.unicorn import uclib

from sterna.arch.armv7 import registers
from sterna.arch.armv7 import stage2 as armv7
from sterna.hypervisor.emulated.guestmode import NO_ABORT, on_exception
from sterna.hypervisor.emulated.native import VCPU
from sterna.hypervisor.interface import HypervisorError, MmioDevice
from sterna.memory.address import PAGE_SIZE
from sterna.memory.ram import RamBlock
from sterna.stage2.tables import Stage2

_LIBC = ctypes.CDLL(None, use_errno=True)
_POLLIN = 1
_MPIDR_MULTIPROCESSOR = 0x8000_0000
_NS_PER_TICK = 16
_COUNTER_MASK = (1 << 64) - 1
VMID = 1
_SCRATCH_PA = 0x1000
_HALF_IT_BLOCK = bytes.fromhex("04bf 00bf 00bf 00bf")
"""itt eq; nop; nop; nop: emulation is told to end behind the first nop."""


def physical_counter() -> int:
    """CNTPCT of every engine: Unicorn derives it from CLOCK_MONOTONIC."""
    return time.monotonic_ns() // _NS_PER_TICK


def _address(function: Any) -> int:
    value = ctypes.cast(function, ctypes.c_void_p).value
    if value is None:
        raise HypervisorError("a C function that the emulation needs has no address")
    return value


class Engine:
    """A Cortex-A15 whose MMU walks `stage2`.

    :ivar uc: the Unicorn engine
    :ivar record: one `VCPU` record, for compiled code
    :ivar failure: what a device's callback raised, to be raised again by whoever runs the CPU

    :raise HypervisorError: When Unicorn refuses.
    """

    def __init__(self, index: int, stage2: Stage2, event_fd: int) -> None:
        self.failure: BaseException | None = None
        try:
            self.uc = Uc(UC_ARCH_ARM, UC_MODE_ARM)
            self.uc.ctl_set_cpu_model(arm.UC_CPU_ARM_CORTEX_A15)
            # Unicorn's default of 1 KiB would take four TLB entries for a page.
            self.uc.ctl_set_page_size(PAGE_SIZE)
            self.uc.mem_map_ptr(stage2.root_pa, stage2.pool_size, UC_PROT_ALL, stage2.pool_hva)
        except UcError as error:
            raise HypervisorError(f"vCPU {index}: the emulator refuses a Cortex-A15: {error}") from error
        self._make_stops_precise()
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
        for register, value in (
            # Non-secure, with hvc allowed; then stage 2 on.
            (registers.SCR, registers.SCR_NS | registers.SCR_HCE),
            # The guest's CPACR keeps what it writes about VFP (ARM DDI 0406C, B4.1.111); otherwise it reads as 0.
            (registers.NSACR, registers.NSACR_CP10 | registers.NSACR_CP11),
            (registers.VMPIDR, _MPIDR_MULTIPROCESSOR | index),
            (registers.HPFAR, NO_ABORT),
            (registers.VTCR, armv7.VTCR),
            (registers.VTTBR, armv7.vttbr(stage2.root_pa, VMID)),
            (registers.HCR, armv7.HCR_VM),
        ):
            registers.write_cp(self.uc, register, value)

    def _make_stops_precise(self) -> None:
        """Let emulation stop between instructions only.

        Code that Unicorn 2.1 translates looks for a stop behind each memory access too. An instruction stopped there is executed
        again when the CPU goes on: a device register is written twice, an ldrd loses its base. It leaves these looks out inside
        a Thumb IT block, and for whatever it translates after one whose end it has not seen; ARM code does not change that. So
        the first code that each engine translates ends inside an IT block.
        """
        uc = self.uc
        cpsr = uc.reg_read(arm.UC_ARM_REG_CPSR)
        uc.mem_map(_SCRATCH_PA, PAGE_SIZE)
        uc.mem_write(_SCRATCH_PA, _HALF_IT_BLOCK)
        uc.emu_start(_SCRATCH_PA | 1, _SCRATCH_PA + 4)
        uc.mem_unmap(_SCRATCH_PA, PAGE_SIZE)
        uc.reg_write(arm.UC_ARM_REG_CPSR, cpsr)

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
        for name, register in (
            ("hpfar", registers.HPFAR),
            ("cval", registers.CNTV_CVAL),
            ("count", registers.CNTVCT),
        ):
            for i, word in enumerate(registers.cp_words(register)):
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

    def set_counter_offset(self, offset: int) -> None:
        """CNTVOFF: the virtual counter is the physical one less this. Emulation is stopped."""
        registers.write_cp(self.uc, registers.CNTVOFF, offset & _COUNTER_MASK)
