"""A vCPU of the emulated hypervisor: what happens outside guest mode."""

import os
import select
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from unicorn import UC_ERR_INSN_INVALID, UcError
from unicorn import arm_const as arm

from sterna.arch.arm import psci
from sterna.arch.armv7 import registers
from sterna.arch.armv7.state import ArmVcpuState
from sterna.hypervisor.emulated import guestmode
from sterna.hypervisor.emulated.engine import Engine
from sterna.hypervisor.emulated.guestmode import ExitKind
from sterna.hypervisor.emulated.tlbsize import TlbSizing
from sterna.hypervisor.interface import Exit, ExitReason, SystemEvent
from sterna.memory.address import Ipa
from sterna.stage2.fault import Outcome
from sterna.stage2.tables import Stage2

_EXCEPTIONS = {
    2: "a supervisor call (svc)",
    3: "a prefetch abort",
    4: "a data abort",
    7: "a breakpoint (bkpt)",
    13: "a secure monitor call (smc)",
}
_SPIN_HINTS = (0xE320F001, 0xE320F002)
"""yield and wfe (ARM DDI 0406C, A8.8.424, A8.8.426)."""
_UDF_MASK, _UDF = 0xFFF0_00F0, 0xE7F0_00F0
"""The permanently undefined instruction (A8.8.247)."""
_SVC_MODE_IRQS_MASKED = 0x1D3


class VcpuOwner(Protocol):
    """What a vCPU asks of its VM."""

    tlb_sizing: TlbSizing

    @property
    def cpus(self) -> Sequence["EmulatedVcpu"]:
        """The VM's vCPUs, by index."""
        ...

    def counter(self) -> int:
        """CNTVCT now."""
        ...

    def reclaim_tables(self) -> bool:
        """No page-table page was left: whether to try again."""
        ...

    def await_release(self) -> None:
        """Return when the memory map is no longer being changed."""
        ...

    def read_physical(self, ipa: Ipa, size: int) -> bytes | None:
        """Guest memory, or None where there is none."""
        ...


class EmulatedVcpu:
    """One vCPU. `run` belongs to one thread; the requests may come from any.

    :ivar powered_off: waits for PSCI to start it
    :ivar power_lock: one caller of PSCI at a time decides whether to start it
    """

    def __init__(self, vm: VcpuOwner, index: int, stage2: Stage2, *, powered_off: bool) -> None:
        self.index = index
        self.powered_off = powered_off
        self._vm = vm
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.engine = Engine(index, stage2, self._event_fd)
        self.record: NDArray[np.void] = self.engine.record
        self._tlbi = stage2.tlbi_pending.ctypes.data + 8 * index
        self._stage2 = stage2
        self._thread = 0
        self._reset = registers.save(self.engine.uc, 0, powered_off)
        self._boot: tuple[int, int] | None = None
        self.power_lock = threading.Lock()

    @property
    def running(self) -> bool:
        """Whether a thread is in `run`."""
        return self._thread != 0

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        """Run guest code until the caller is needed; see the interface."""
        self._thread = threading.get_ident()
        self._vm.tlb_sizing.start()
        try:
            while True:
                requests = guestmode.take_requests(self.record)
                if requests & guestmode.REQUEST_TLB_FLUSH:
                    guestmode.flush_tlb(self.record)
                if requests & guestmode.REQUEST_HOLD:
                    self._vm.await_release()
                if requests & guestmode.REQUEST_EXIT:
                    return Exit(ExitReason.INTR)
                if self._boot is not None:
                    self._start()
                if self.powered_off:
                    self._sleep()
                    continue
                guestmode.run_guest(self.record, self._tlbi)
                report = self._handle_exit()
                if report is not None:
                    return report
        finally:
            self._thread = 0

    def _sleep(self) -> None:
        """Wait for PSCI or a request."""
        waiting = select.poll()
        waiting.register(self._event_fd, select.POLLIN)
        waiting.poll()
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass

    def _start(self) -> None:
        """Begin as PSCI has told it: at the entry, all else as after a reset (ARM DEN 0022, CPU_ON)."""
        assert self._boot is not None
        entry, context = self._boot
        cpsr = _SVC_MODE_IRQS_MASKED | (entry & 1) << 5
        self._replace(replace(self._reset, cpsr=cpsr, regs=[context, *self._reset.regs[1:15], entry & ~1]))
        self.powered_off = False
        # Last: until then the start is pending for whoever asks.
        self._boot = None

    def _handle_exit(self) -> Exit | None:
        if self.engine.failure is not None:
            failure, self.engine.failure = self.engine.failure, None
            raise failure
        record = self.record[0]
        kind = ExitKind(int(record["exit_kind"]))
        if kind is ExitKind.HYPERCALL:
            return self._hypercall()
        if kind is ExitKind.STAGE2:
            if record["exit_outcome"] == Outcome.NO_MEMORY and self._vm.reclaim_tables():
                return None
            return self._report(self._describe_abort())
        if kind is ExitKind.EXCEPTION:
            number = int(record["exit_exception"])
            name = _EXCEPTIONS.get(number, f"exception {number}")
            return self._report(f"the guest took {name}, which this CPU model does not deliver")
        error = int(record["error"])
        if error == UC_ERR_INSN_INVALID:
            return self._undefined()
        if error:
            return self._report(f"the emulator stopped: {UcError(error)}")
        return None

    def _undefined(self) -> Exit | None:
        """An undefined instruction, or a hint: Unicorn ends emulation behind a wfe or yield with the same error."""
        before, code = self._instruction(self.pc - 4), self._instruction(self.pc)
        if before in _SPIN_HINTS and (code is None or code & _UDF_MASK != _UDF):
            os.sched_yield()
            return None
        shown = "" if code is None else f" {code:#010x}"
        return self._report(f"undefined instruction{shown}")

    def _instruction(self, address: int) -> int | None:
        """The ARM instruction at an address, which is taken for an IPA: the guest's own translation is not followed."""
        code = self._vm.read_physical(Ipa(address & ~3), 4)
        return None if code is None else int.from_bytes(code, "little")

    def _hypercall(self) -> Exit | None:
        uc = self.engine.uc
        r0, r1, r2, r3 = (int(uc.reg_read(arm.UC_ARM_REG_R0 + i)) for i in range(4))
        events: list[SystemEvent] = []
        result = psci.call(r0, (r1, r2, r3), self._vm.cpus, self, events.append)
        uc.reg_write(arm.UC_ARM_REG_R0, result)
        if events:
            return Exit(ExitReason.SYSTEM_EVENT, event=events[0])
        return None

    def _describe_abort(self) -> str:
        record = self.record[0]
        ipa = int(record["exit_ipa"])
        outcome = Outcome(int(record["exit_outcome"]))
        access = "instruction fetch" if record["exit_exception"] == guestmode.PREFETCH_ABORT else "access"
        if outcome is Outcome.READONLY:
            return f"write to read-only memory: stage-2 permission fault in the page at IPA {ipa:#x}"
        if outcome is Outcome.NO_MEMORY:
            return f"no page-table page left: stage-2 translation fault in the page at IPA {ipa:#x}"
        return f"{access} outside memory: stage-2 translation fault in the page at IPA {ipa:#x}"

    def _report(self, what: str) -> Exit:
        return Exit(ExitReason.INTERNAL_ERROR, detail=f"vCPU {self.index}: {what}, pc {self.pc:#010x}")

    @property
    def pc(self) -> int:
        """Address of the next instruction. The vCPU is not running."""
        return int(self.engine.uc.reg_read(arm.UC_ARM_REG_PC))

    # -- requests from other threads -----------------------------------------------------------------------------------

    def kick(self) -> None:
        """Make `run` return INTR."""
        self._request(guestmode.REQUEST_EXIT)

    def wake(self) -> None:
        """End a wfi."""
        guestmode.set_wake(self.record)
        os.eventfd_write(self._event_fd, 1)

    def set_interrupt(self, level: bool) -> None:
        """Interrupts are not taken here: the line ends each wfi while it is high, and that is all."""
        self.record[0]["interrupt"] = level
        if level:
            os.eventfd_write(self._event_fd, 1)

    def set_timer_wakes(self, enabled: bool) -> None:
        """Whether the virtual timer's interrupt ends a wfi."""
        self.record[0]["timer_wakes"] = enabled
        # One already waiting has to look at the timer again.
        self.wake()

    @property
    def starting(self) -> bool:
        """PSCI has told it to start, and it has not run yet."""
        return self._boot is not None

    def power_on(self, entry: int, context: int) -> None:
        """PSCI CPU_ON."""
        self._boot = (entry, context)
        os.eventfd_write(self._event_fd, 1)

    def _request(self, bit: int) -> bool:
        in_guest = bool(guestmode.request(self.record, bit))
        os.eventfd_write(self._event_fd, 1)
        if in_guest:
            if threading.get_ident() == self._thread:
                guestmode.stop_from_within(self.record)
            else:
                guestmode.force_out(self.record)
        return in_guest

    def request_tlb_flush(self) -> bool:
        """The generic flush's request; see stage2/tlb.py."""
        in_guest = bool(guestmode.request(self.record, guestmode.REQUEST_TLB_FLUSH))
        os.eventfd_write(self._event_fd, 1)
        return in_guest

    def await_tlb_flush(self) -> None:
        """Return when this vCPU is out of guest mode."""
        guestmode.force_out(self.record)

    def hold(self) -> None:
        """Out of guest mode until the VM releases it."""
        self._request(guestmode.REQUEST_HOLD)

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_state(self) -> ArmVcpuState:
        """All registers; a CPU that PSCI has just started shows them as the start will set them."""
        if self._boot is not None:
            self._start()
        return registers.save(self.engine.uc, self._vm.counter(), self.powered_off)

    def set_state(self, state: ArmVcpuState) -> None:
        """Replace all registers."""
        self._replace(state)
        self.powered_off = state.powered_off
        self._boot = None

    def _replace(self, state: ArmVcpuState) -> None:
        registers.restore(self.engine.uc, state)
        # Nothing translated from another state's memory may survive it: neither addresses nor code, which the emulator
        # keeps translated until the guest itself writes to it.
        guestmode.flush_tlb(self.record)
        self.engine.uc.ctl_flush_tb()

    def close(self) -> None:
        """Free the vCPU's resources; `run` is not running."""
        if self._event_fd >= 0:
            os.close(self._event_fd)
            self._event_fd = -1
