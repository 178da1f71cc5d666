"""A vCPU of the kernel's: running it, getting it out again, and the exits that all architectures have."""

import ctypes
import errno
import mmap
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from sterna.hypervisor.interface import Exit, ExitReason, HypervisorError, SystemEvent
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.kvm.run import (
    KICK_SIGNAL,
    RUN,
    ExitCode,
    KvmRun,
    Mmio,
    discard_signals,
    let_signal_in,
)
from sterna.hypervisor.memorymap import MemoryMap
from sterna.hypervisor.traits import Trait

_SUBERRORS = {
    1: "an instruction that it had to emulate and cannot",
    2: "events at the same time that the CPU does not allow",
    3: "an event while another was being delivered",
    4: "an exit that it does not expect",
}
"""KVM_INTERNAL_ERROR_*"""


class VcpuOwner(Protocol):
    """What a vCPU asks of its VM."""

    memory: MemoryMap

    def drain_rings(self) -> None:
        """Empty the dirty rings."""
        ...

    def is_in_slot(self, ipa: int) -> bool:
        """Whether there is memory, once no change of the slots is under way."""
        ...


class KvmVcpu(ABC):
    """One vCPU; see the interface for its calls. An architecture adds its exits and its state.

    :ivar fd: its descriptor
    :ivar traits: what its guest may rely on of the host

    :param mapping_bytes: size of struct kvm_run and what follows it
    """

    def __init__(self, vm: VcpuOwner, fd: Descriptor, index: int, mapping_bytes: int) -> None:
        self.index = index
        self.fd = fd
        self.traits: Sequence[Trait] = ()
        self._vm = vm
        self._mapping = mmap.mmap(fd.number, mapping_bytes)
        self.shared = KvmRun.from_buffer(self._mapping)
        # What a kick, a wake and the thread in `run` tell each other.
        self._changed = threading.Condition()
        self._thread: int | None = None
        self._kicked = False
        self._woken = False
        self._in_guest = False
        self._exits = 0
        self._unfinished = False

    # -- running -------------------------------------------------------------------------------------------------------

    def run(self) -> Exit:
        """Run guest code until the caller is needed; see the interface."""
        with self._on_this_thread():
            while True:
                self._in_guest = True
                error, _ = self.fd.attempt(RUN)
                self._exits += 1
                self._in_guest = False
                self._unfinished = error != errno.EINTR
                if error == errno.EINTR:
                    # Also what an access to a device left to be done in the CPU is done by now.
                    if self._take_kick():
                        return Exit(ExitReason.INTR)
                    continue
                if error:
                    return self._refused(error)
                leaving = self._handle_exit()
                if leaving is not None:
                    return leaving

    @contextmanager
    def _on_this_thread(self) -> Iterator[None]:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (KICK_SIGNAL,))
        let_signal_in(self.fd)
        with self._changed:
            self._thread = threading.get_ident()
        try:
            yield
        finally:
            with self._changed:
                self._thread = None
            discard_signals()
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _take_kick(self) -> bool:
        with self._changed:
            discard_signals()
            kicked, self._kicked = self._kicked, False
            if kicked:
                self.shared.immediate_exit = 0
            return kicked

    def _refused(self, error: int) -> Exit:
        name = errno.errorcode.get(error, str(error))
        what = f"KVM_RUN failed: {os.strerror(error)} ({name})"
        if error == errno.EFAULT:
            what = "KVM_RUN failed: memory of the guest cannot be had from the host (EFAULT)"
            if self.shared.exit_reason == ExitCode.MEMORY_FAULT:
                what += f" at IPA {self.shared.memory_fault.gpa:#x}"
        return self._report(what)

    # -- exits ---------------------------------------------------------------------------------------------------------

    def _handle_exit(self) -> Exit | None:
        """Deal with what ended KVM_RUN; None to go on."""
        shared = self.shared
        match shared.exit_reason:
            case ExitCode.MMIO:
                return self._access_device(shared.mmio)
            case ExitCode.INTR:
                return None
            case ExitCode.DIRTY_RING_FULL:
                self._vm.drain_rings()
                return None
            case ExitCode.SYSTEM_EVENT:
                return self._system_event(shared.system_event.type)
            case ExitCode.SHUTDOWN:
                return self._report("the CPU shut down (triple fault)", ExitReason.SHUTDOWN)
            case ExitCode.FAIL_ENTRY:
                number = shared.fail_entry.hardware_entry_failure_reason
                return self._report(
                    f"the hardware refused its state, reason {number:#x}", ExitReason.FAIL_ENTRY
                )
            case ExitCode.INTERNAL_ERROR:
                internal = shared.internal
                what = _SUBERRORS.get(internal.suberror, f"suberror {internal.suberror}")
                data = " ".join(f"{value:#x}" for value in internal.data[: min(internal.ndata, 16)])
                return self._report(f"KVM met {what}" + (f" (data {data})" if data else ""))
            case other:
                return self._handle_own_exit(other)

    @abstractmethod
    def _handle_own_exit(self, code: int) -> Exit | None:
        """Deal with an exit of this architecture's; for one that it does not have, `_unexpected`."""

    @abstractmethod
    def _where(self) -> str:
        """The address of the next instruction, as text: ``rip 0x8000``."""

    def _unexpected(self, code: int) -> Exit:
        name = f"KVM_EXIT_{ExitCode(code).name}" if code in set(ExitCode) else f"exit {code}"
        return self._report(f"{name}, which no guest of this machine causes")

    def _report(self, what: str, reason: ExitReason = ExitReason.INTERNAL_ERROR) -> Exit:
        return Exit(reason, detail=f"vCPU {self.index}: {what}, {self._where()}")

    def _system_event(self, kind: int) -> Exit:
        try:
            return Exit(ExitReason.SYSTEM_EVENT, event=SystemEvent(kind))
        except ValueError:
            return self._report(f"system event {kind}, which no guest of this machine causes")

    def _access_device(self, mmio: Mmio) -> Exit | None:
        """An access to what is not memory, or a write to memory that is read-only."""
        ipa, size = mmio.phys_addr, mmio.len
        found = self._vm.memory.device_at(ipa, size)
        if found is None:
            # A slot that is being deleted is gone in the kernel a moment before it is here.
            if mmio.is_write and self._vm.is_in_slot(ipa):
                return self._report(f"write to read-only memory at IPA {ipa:#x}")
            return self._report(f"access outside memory at IPA {ipa:#x}")
        device, offset = found
        if mmio.is_write:
            device.mmio_write(offset, size, int.from_bytes(mmio.data[:size], "little"), self.index)
        else:
            value = device.mmio_read(offset, size, self.index)
            mmio.data[:size] = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        return None

    # -- requests from other threads -----------------------------------------------------------------------------------

    def kick(self) -> None:
        """Make `run` return INTR."""
        with self._changed:
            self._kicked = True
            self.shared.immediate_exit = 1
            self._signal()

    def wake(self) -> None:
        """End a sleep of this vCPU's."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def _signal(self) -> None:
        if self._thread is not None:
            signal.pthread_kill(self._thread, KICK_SIGNAL)
        self._changed.notify_all()

    def sleep(self, ns: int) -> None:
        """Let the vCPU stand still, within an access to a device on its thread, until so much time has passed, or a `wake` or
        `kick` ends it.
        """
        with self._changed:
            # A guest may ask for more than Python can wait: 292 years.
            self._changed.wait_for(lambda: self._kicked or self._woken, min(ns / 1e9, threading.TIMEOUT_MAX))
            self._woken = False

    def leave_guest(self) -> None:
        """Have it out of guest mode for a moment, so that what the CPU itself logs gets to its dirty ring. `run` goes on."""
        before = self._exits
        if not self._in_guest:
            return
        with self._changed:
            self._signal()
        while self._in_guest and self._exits == before:
            time.sleep(0)

    # -- the end -------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Free the vCPU; `run` is not running."""
        if self.fd.number < 0:
            return
        del self.shared
        self._mapping.close()
        self.fd.close()

    def finish_access(self) -> None:
        """Have the kernel do in the CPU what an access to a device has left to be done there; no guest code runs.

        Registers read before would not show it, and it would spoil those that are set. A vCPU that returned INTR from `run` has
        nothing left. One that never ran has not either, and KVM_RUN would fix what its CPU is (arm64's ID registers).
        """
        with self._changed:
            self.shared.immediate_exit = 1
            try:
                # Each call does a part: an access may be one of several pages. EINTR says that none is left.
                while self._unfinished:
                    error, _ = self.fd.attempt(RUN)
                    if error not in (errno.EINTR, 0):
                        raise HypervisorError(f"vCPU {self.index}: KVM_RUN failed: {os.strerror(error)}")
                    self._unfinished = error != errno.EINTR
            finally:
                self.shared.immediate_exit = int(self._kicked)


assert ctypes.sizeof(KvmRun) <= 4096
