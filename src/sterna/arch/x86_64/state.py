"""The state of an x86_64 vCPU."""

from dataclasses import dataclass

GENERAL_REGISTERS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{number}" for number in range(8, 16)),
    *("rip", "rflags"),
)
SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
SEGMENT_PARTS = {
    "base": 64,
    "limit": 32,
    "selector": 16,
    **dict.fromkeys(("type", "present", "dpl", "db", "s", "l", "g", "avl", "unusable"), 8),
}
"""A segment register and what the CPU has cached of its descriptor (Intel SDM vol. 3, 3.4.5): bits of each part."""
CONTROL_REGISTERS = ("cr0", "cr2", "cr3", "cr4", "cr8", "efer", "apic_base")
EVENT_PARTS = {
    **dict.fromkeys(
        ("exception_injected", "exception_nr", "exception_has_error_code", "exception_pending"), 8
    ),
    "exception_error_code": 32,
    "exception_has_payload": 8,
    "exception_payload": 64,
    **dict.fromkeys(("interrupt_injected", "interrupt_nr", "interrupt_soft", "interrupt_shadow"), 8),
    **dict.fromkeys(("nmi_injected", "nmi_pending", "nmi_masked"), 8),
    "sipi_vector": 32,
    **dict.fromkeys(("smi_smm", "smi_pending", "smi_inside_nmi", "smi_latched_init"), 8),
    "triple_fault_pending": 8,
    "flags": 32,
}
"""struct kvm_vcpu_events, flattened: bits of each part."""

CLOCK_HZ = 1_000_000_000
"""Frequency of the VM's clock (kvmclock), which is the guests' counter."""

MSR_TSC = 0x10
MSR_KVM_SYSTEM_TIME = 0x4B564D01
"""Where the kernel keeps a vCPU's time record, bit 0: on (Documentation/virt/kvm/x86/msr.rst, MSR_KVM_SYSTEM_TIME_NEW)."""


@dataclass(frozen=True)
class Leaf:
    """What CPUID answers for one function (and index, where `flags` has bit 0)."""

    function: int
    index: int
    flags: int
    eax: int
    ebx: int
    ecx: int
    edx: int


@dataclass
class X86VcpuState:
    """An x86_64 CPU.

    :ivar cpuid: what CPUID shows
    :ivar regs: by the names of `GENERAL_REGISTERS`
    :ivar segments: by the names of `SEGMENTS`, each by those of `SEGMENT_PARTS`
    :ivar gdt: base and limit
    :ivar idt: base and limit
    :ivar control: by the names of `CONTROL_REGISTERS`
    :ivar interrupts: which external interrupts wait, 256 bits in 4 words
    :ivar xcrs: extended control registers by number
    :ivar xsave: the area that XSAVE writes, in its standard form
    :ivar msrs: model-specific registers by number: those that the kernel lists and that can be read
    :ivar events: by the names of `EVENT_PARTS`
    :ivar debug: DR0 to DR3, DR6, DR7
    :ivar mp_state: KVM_MP_STATE_*
    :ivar tsc_khz: frequency of the time stamp counter
    """

    cpuid: list[Leaf]
    regs: dict[str, int]
    segments: dict[str, dict[str, int]]
    gdt: tuple[int, int]
    idt: tuple[int, int]
    control: dict[str, int]
    interrupts: list[int]
    xcrs: dict[int, int]
    xsave: bytes
    msrs: dict[int, int]
    events: dict[str, int]
    debug: list[int]
    mp_state: int
    tsc_khz: int

    @property
    def position(self) -> int:
        """The program counter."""
        return self.regs["rip"]

    def dump(self) -> str:
        """The general registers, four to a line, then segments and control registers."""
        names = list(self.regs)
        lines = [
            " ".join(f"{name.upper():<6}={self.regs[name]:016x}" for name in names[first : first + 4])
            for first in range(0, len(names), 4)
        ]
        for name in SEGMENTS:
            segment = self.segments[name]
            lines.append(
                f"{name.upper():<3}={segment['selector']:04x} {segment['base']:016x} {segment['limit']:08x} "
                f"type {segment['type']:2} DPL {segment['dpl']}{' present' if segment['present'] else ''}"
            )
        lines += [
            f"{name.upper()}={base:016x} {limit:04x}"
            for name, (base, limit) in (("gdt", self.gdt), ("idt", self.idt))
        ]
        lines.append(" ".join(f"{name.upper()}={self.control[name]:x}" for name in CONTROL_REGISTERS))
        if self.events["exception_injected"] or self.events["exception_pending"]:
            lines.append(
                f"exception {self.events['exception_nr']}, error code {self.events['exception_error_code']:#x}"
            )
        return "\n".join(lines)
