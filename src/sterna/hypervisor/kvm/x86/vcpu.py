"""An x86_64 vCPU: its own exits, and its state."""

import ctypes
from collections.abc import Iterable
from typing import Any

from sterna.hypervisor.interface import Exit
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.kvm.run import ExitCode
from sterna.hypervisor.kvm.vcpu import KvmVcpu, VcpuOwner
from sterna.hypervisor.kvm.x86 import fpu, msrs, registers
from sterna.hypervisor.kvm.x86.clock import GET_TSC_KHZ
from sterna.hypervisor.x86 import (
    CONTROL_REGISTERS,
    EVENT_PARTS,
    GENERAL_REGISTERS,
    SEGMENT_PARTS,
    SEGMENTS,
    X86VcpuState,
)


class X86KvmVcpu(KvmVcpu):
    """One vCPU of a long-mode guest; see the interface for its calls.

    :param xsave_bytes: size of the area that XSAVE writes
    :param msr_numbers: the MSRs that make up its state
    """

    def __init__(
        self,
        vm: VcpuOwner,
        fd: Descriptor,
        index: int,
        mapping_bytes: int,
        *,
        xsave_bytes: int,
        msr_numbers: list[int],
    ) -> None:
        super().__init__(vm, fd, index, mapping_bytes)
        self._xsave_bytes = xsave_bytes
        self._msr_numbers = msr_numbers

    def _handle_own_exit(self, code: int) -> Exit | None:
        if code == ExitCode.IO:
            port = self.shared.io
            direction = "to" if port.direction else "from"
            return self._report(f"{port.size}-byte access {direction} port {port.port:#x}, where nothing is")
        return self._unexpected(code)

    def _where(self) -> str:
        return f"rip {registers.instruction_pointer(self.fd):#x}"

    # -- state ---------------------------------------------------------------------------------------------------------

    def get_state(self) -> X86VcpuState:
        """All registers."""
        self.finish_access()
        regs, sregs, debug = registers.Regs(), registers.Sregs(), registers.DebugRegs()
        events, mp_state = registers.VcpuEvents(), registers.MpState()
        self.fd.call(registers.GET_MP_STATE, mp_state)
        self.fd.call(registers.GET_REGS, regs)
        self.fd.call(registers.GET_SREGS, sregs)
        self.fd.call(registers.GET_VCPU_EVENTS, events)
        self.fd.call(registers.GET_DEBUGREGS, debug)
        return X86VcpuState(
            regs=_by_name(regs, GENERAL_REGISTERS),
            segments={name: _by_name(getattr(sregs, name), SEGMENT_PARTS) for name in SEGMENTS},
            gdt=(sregs.gdt.base, sregs.gdt.limit),
            idt=(sregs.idt.base, sregs.idt.limit),
            control=_by_name(sregs, CONTROL_REGISTERS),
            interrupts=list(sregs.interrupt_bitmap),
            xcrs=fpu.get_xcrs(self.fd),
            xsave=fpu.get_xsave(self.fd, self._xsave_bytes),
            msrs=msrs.get_msrs(self.fd, self._msr_numbers),
            events=_by_name(events, EVENT_PARTS),
            debug=[*debug.db, debug.dr6, debug.dr7],
            mp_state=mp_state.mp_state,
            tsc_khz=self.fd.call(GET_TSC_KHZ),
        )

    def set_state(self, state: X86VcpuState) -> None:
        """Replace all registers, in an order that each finds what it is checked against in place."""
        sregs = registers.Sregs(**state.control)
        for name in SEGMENTS:
            setattr(sregs, name, registers.Segment(**state.segments[name]))
        sregs.gdt = registers.DescriptorTable(*state.gdt)
        sregs.idt = registers.DescriptorTable(*state.idt)
        sregs.interrupt_bitmap = (ctypes.c_uint64 * 4)(*state.interrupts)
        self.fd.call(registers.SET_SREGS, sregs)
        fpu.set_xcrs(self.fd, state.xcrs)
        fpu.set_xsave(self.fd, state.xsave, self._xsave_bytes)
        msrs.set_msrs(self.fd, state.msrs)
        self.fd.call(registers.SET_VCPU_EVENTS, registers.VcpuEvents(**state.events))
        self.fd.call(registers.SET_MP_STATE, registers.MpState(state.mp_state))
        *db, dr6, dr7 = state.debug
        self.fd.call(registers.SET_DEBUGREGS, registers.DebugRegs((ctypes.c_uint64 * 4)(*db), dr6, dr7))
        # Last: an exception that an event brings with it looks at them.
        self.fd.call(registers.SET_REGS, registers.Regs(**state.regs))


def _by_name(structure: Any, names: Iterable[str]) -> dict[str, int]:
    return {name: getattr(structure, name) for name in names}
