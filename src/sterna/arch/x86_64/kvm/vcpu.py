"""An x86_64 vCPU: its own exits, and its state."""

import ctypes
from collections.abc import Iterable
from typing import Any

from sterna.arch.x86_64.kvm import cpuid, fpu, msrs, registers, traits
from sterna.arch.x86_64.kvm.clock import GET_TSC_KHZ, SET_TSC_KHZ
from sterna.arch.x86_64.state import (
    CONTROL_REGISTERS,
    EVENT_PARTS,
    GENERAL_REGISTERS,
    SEGMENT_PARTS,
    SEGMENTS,
    Leaf,
    X86VcpuState,
)
from sterna.hypervisor.interface import Exit, HypervisorError
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.kvm.run import GET_MP_STATE, SET_MP_STATE, ExitCode, MpState
from sterna.hypervisor.kvm.vcpu import KvmVcpu, VcpuOwner
from sterna.hypervisor.traits import first_difference


class X86KvmVcpu(KvmVcpu):
    """One vCPU of a long-mode guest; see the interface for its calls.

    :param leaves: what CPUID shows
    :param xsave_bytes: size of the area that XSAVE writes
    :param msr_numbers: the MSRs that make up a vCPU's state, where it has them
    """

    def __init__(
        self,
        vm: VcpuOwner,
        fd: Descriptor,
        index: int,
        mapping_bytes: int,
        *,
        leaves: list[Leaf],
        xsave_bytes: int,
        msr_numbers: list[int],
    ) -> None:
        super().__init__(vm, fd, index, mapping_bytes)
        self._leaves = leaves
        self._xsave_bytes = xsave_bytes
        cpuid.set_cpuid(fd, leaves)
        self._msr_numbers = list(msrs.get_msrs(fd, msr_numbers))
        self._tsc_khz = fd.call(GET_TSC_KHZ)
        # Asked for now: the kernel answers no such question while the vCPU runs.
        self.traits = traits.of_vm(leaves, self._msr_numbers, xsave_bytes, self._tsc_khz)

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
        events, mp_state = registers.VcpuEvents(), MpState()
        self.fd.call(GET_MP_STATE, mp_state)
        self.fd.call(registers.GET_REGS, regs)
        self.fd.call(registers.GET_SREGS, sregs)
        self.fd.call(registers.GET_VCPU_EVENTS, events)
        self.fd.call(registers.GET_DEBUGREGS, debug)
        return X86VcpuState(
            cpuid=self._leaves,
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
            tsc_khz=self._tsc_khz,
        )

    def set_state(self, state: X86VcpuState) -> None:
        """Replace all registers, in an order that each finds what it is checked against in place."""
        self.finish_access()
        self._show(state.cpuid)
        self._set_tsc_khz(state.tsc_khz)
        sregs = registers.Sregs(**state.control)
        for name in SEGMENTS:
            setattr(sregs, name, registers.Segment(**state.segments[name]))
        sregs.gdt = registers.DescriptorTable(*state.gdt)
        sregs.idt = registers.DescriptorTable(*state.idt)
        sregs.interrupt_bitmap = (ctypes.c_uint64 * 4)(*state.interrupts)
        self.fd.call(registers.SET_SREGS, sregs)
        # Without a local APIC in the kernel, KVM_RUN takes CR8 from here (Documentation/virt/kvm/api.rst, 5).
        self.shared.cr8 = sregs.cr8
        fpu.set_xcrs(self.fd, state.xcrs)
        fpu.set_xsave(self.fd, state.xsave, self._xsave_bytes)
        msrs.set_msrs(self.fd, state.msrs)
        self.fd.call(registers.SET_VCPU_EVENTS, registers.VcpuEvents(**state.events))
        self.fd.call(SET_MP_STATE, MpState(state.mp_state))
        *db, dr6, dr7 = state.debug
        self.fd.call(registers.SET_DEBUGREGS, registers.DebugRegs((ctypes.c_uint64 * 4)(*db), dr6, dr7))
        # Last: an exception that an event brings with it looks at them.
        self.fd.call(registers.SET_REGS, registers.Regs(**state.regs))

    def _show(self, leaves: list[Leaf]) -> None:
        """Let CPUID show what it has shown where the state comes from."""
        if leaves == self._leaves:
            return
        here = {trait.name: trait.value for trait in self.traits}
        difference = first_difference(traits.of_cpuid(leaves), here)
        if difference is not None:
            raise HypervisorError(f"this host has another CPU: {difference}")
        cpuid.set_cpuid(self.fd, leaves)
        self._leaves = leaves

    def _set_tsc_khz(self, khz: int) -> None:
        if khz != self._tsc_khz:
            self.fd.call(SET_TSC_KHZ, khz)
            self._tsc_khz = khz


def _by_name(structure: Any, names: Iterable[str]) -> dict[str, int]:
    return {name: getattr(structure, name) for name in names}
