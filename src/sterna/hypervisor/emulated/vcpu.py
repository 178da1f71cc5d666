"""A vCPU of the emulated hypervisor: what happens outside guest mode."""

import os
import select
import threading
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from unicorn import UC_ERR_INSN_INVALID, UcError

from sterna.hypervisor.emulated import guestmode
from sterna.hypervisor.emulated.engine import Engine
from sterna.hypervisor.emulated.guestmode import ExitKind
from sterna.hypervisor.emulated.tlbsize import TlbSizing
from sterna.hypervisor.interface import Exit, ExitReason
from sterna.memory.address import Ipa
from sterna.stage2.fault import FaultResult
from sterna.stage2.tables import Stage2


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

    :ivar powered_off: waits for another one to start it
    :ivar power_lock: one caller at a time decides whether to start it

    :param cpu: makes the CPU
    """

    def __init__(
        self, vm: VcpuOwner, cpu: type[Engine[Any]], index: int, stage2: Stage2, *, powered_off: bool
    ) -> None:
        self.index = index
        self.powered_off = powered_off
        self._vm = vm
        self._event_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.engine = cpu(index, stage2, self._event_fd)
        self.record: NDArray[np.void] = self.engine.record
        self._tlbi = stage2.tlbi_pending.ctypes.data + 8 * index
        self._stage2 = stage2
        self._thread = 0
        self._reset = self.engine.save(0, powered_off)
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
        """Wait for a start or a request."""
        waiting = select.poll()
        waiting.register(self._event_fd, select.POLLIN)
        waiting.poll()
        try:
            os.eventfd_read(self._event_fd)
        except BlockingIOError:
            pass

    def _start(self) -> None:
        """Begin as it has been told."""
        assert self._boot is not None
        self._replace(self.engine.started(self._reset, *self._boot))
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
            event = self.engine.hypercall(self._vm.cpus, self)
            return None if event is None else Exit(ExitReason.SYSTEM_EVENT, event=event)
        if kind is ExitKind.STAGE2:
            if record["exit_outcome"] == FaultResult.NO_MEMORY and self._vm.reclaim_tables():
                return None
            return self._report(self._describe_abort())
        if kind is ExitKind.EXCEPTION:
            number = int(record["exit_exception"])
            name = self.engine.exceptions.get(number, f"exception {number}")
            return self._report(f"the guest took {name}, which this CPU model does not deliver")
        error = int(record["error"])
        if error == UC_ERR_INSN_INVALID:
            what = self.engine.undefined(self._vm.read_physical)
            if what is not None:
                return self._report(what)
            os.sched_yield()
            return None
        if error:
            return self._report(f"the emulator stopped: {UcError(error)}")
        return None

    def _describe_abort(self) -> str:
        record = self.record[0]
        ipa = int(record["exit_ipa"])
        outcome = FaultResult(int(record["exit_outcome"]))
        access = "instruction fetch" if record["exit_exception"] == guestmode.PREFETCH_ABORT else "access"
        if outcome is FaultResult.READONLY:
            return f"write to read-only memory: stage-2 permission fault in the page at IPA {ipa:#x}"
        if outcome is FaultResult.NO_MEMORY:
            return f"no page-table page left: stage-2 translation fault in the page at IPA {ipa:#x}"
        return f"{access} outside memory: stage-2 translation fault in the page at IPA {ipa:#x}"

    def _report(self, what: str) -> Exit:
        return Exit(ExitReason.INTERNAL_ERROR, detail=f"vCPU {self.index}: {what}, pc {self.engine.pc:#010x}")

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
        """It has been told to start, and has not run yet."""
        return self._boot is not None

    def power_on(self, entry: int, context: int) -> None:
        """Start at `entry` with `context` in its first register (PSCI CPU_ON)."""
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

    def get_state(self) -> Any:
        """All registers; a CPU that has just been started shows them as the start will set them."""
        if self._boot is not None:
            self._start()
        return self.engine.save(self._vm.counter(), self.powered_off)

    def set_state(self, state: Any) -> None:
        """Replace all registers."""
        self._replace(state)
        self.powered_off = state.powered_off
        self._boot = None

    def _replace(self, state: Any) -> None:
        self.engine.restore(state)
        # Nothing translated from another state's memory may survive it: neither addresses nor code, which the emulator
        # keeps translated until the guest itself writes to it.
        guestmode.flush_tlb(self.record)
        self.engine.uc.ctl_flush_tb()

    def close(self) -> None:
        """Free the vCPU's resources; `run` is not running."""
        if self._event_fd >= 0:
            os.close(self._event_fd)
            self._event_fd = -1
