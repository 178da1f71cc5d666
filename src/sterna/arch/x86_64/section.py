"""Section `x86-cpu`: an x86_64 CPU."""

from typing import Any

from sterna.arch.x86_64.state import (
    CONTROL_REGISTERS,
    EVENT_PARTS,
    GENERAL_REGISTERS,
    SEGMENT_PARTS,
    SEGMENTS,
    Leaf,
    X86VcpuState,
)
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    counted_array,
    counted_buffer,
    struct,
    u8,
    u16,
    u32,
    u64,
)

_CPUID_LIMIT = 256
_LEAF_PARTS = ("function", "index", "flags", "eax", "ebx", "ecx", "edx")
_MSR_LIMIT = 4096
_XCR_LIMIT = 16
_XSAVE_LIMIT = 1 << 16
_UNSIGNED = {8: u8, 16: u16, 32: u32, 64: u64}
_TABLES = ("gdt", "idt")
_DEBUG_REGISTERS = 6
_INTERRUPT_WORDS = 4

_SEGMENT = VmStateDescription(
    "x86-segment", version=1, fields=tuple(_UNSIGNED[bits](name) for name, bits in SEGMENT_PARTS.items())
)
_EVENTS = VmStateDescription(
    "x86-events", version=1, fields=tuple(_UNSIGNED[bits](name) for name, bits in EVENT_PARTS.items())
)

X86_CPU = VmStateDescription(
    "x86-cpu",
    version=1,
    fields=(
        *(u64(name) for name in GENERAL_REGISTERS),
        *(struct(name, _SEGMENT) for name in SEGMENTS),
        *(field for name in _TABLES for field in (u64(f"{name}.base"), u16(f"{name}.limit"))),
        *(u64(name) for name in CONTROL_REGISTERS),
        array(u64("interrupt_bitmap"), _INTERRUPT_WORDS),
        array(u64("debug"), _DEBUG_REGISTERS),
        struct("events", _EVENTS),
        u32("mp_state"),
        u32("tsc_khz"),
        u32("cpuid_count"),
        *(
            counted_array(u32(f"cpuid_{part}"), counted_by="cpuid_count", limit=_CPUID_LIMIT)
            for part in _LEAF_PARTS
        ),
        u32("xcr_count"),
        counted_array(u32("xcr_numbers"), counted_by="xcr_count", limit=_XCR_LIMIT),
        counted_array(u64("xcr_values"), counted_by="xcr_count", limit=_XCR_LIMIT),
        u32("xsave_bytes"),
        counted_buffer("xsave", counted_by="xsave_bytes", limit=_XSAVE_LIMIT),
        u32("msr_count"),
        counted_array(u32("msr_numbers"), counted_by="msr_count", limit=_MSR_LIMIT),
        counted_array(u64("msr_values"), counted_by="msr_count", limit=_MSR_LIMIT),
    ),
)


def save_cpu(state: X86VcpuState, index: int) -> DeviceState:
    """The section of CPU `index`."""
    fields: dict[str, Any] = {**state.regs, **state.control, **state.segments}
    for name, (base, limit) in zip(_TABLES, (state.gdt, state.idt), strict=True):
        fields |= {f"{name}.base": base, f"{name}.limit": limit}
    fields |= {
        "interrupt_bitmap": state.interrupts,
        "debug": state.debug,
        "events": state.events,
        "mp_state": state.mp_state,
        "tsc_khz": state.tsc_khz,
        "cpuid_count": len(state.cpuid),
        **{f"cpuid_{part}": [getattr(leaf, part) for leaf in state.cpuid] for part in _LEAF_PARTS},
        "xcr_count": len(state.xcrs),
        "xcr_numbers": list(state.xcrs),
        "xcr_values": list(state.xcrs.values()),
        "xsave_bytes": len(state.xsave),
        "xsave": state.xsave,
        "msr_count": len(state.msrs),
        "msr_numbers": list(state.msrs),
        "msr_values": list(state.msrs.values()),
    }
    return DeviceState(X86_CPU.name, index, X86_CPU.version, fields)


def load_cpu(section: DeviceState) -> X86VcpuState:
    """A CPU's state from its section. Whether this host can have it, the hypervisor says.

    :raise StreamError: When a register comes twice.
    """
    fields = section.fields
    columns = (fields[f"cpuid_{part}"] for part in _LEAF_PARTS)
    return X86VcpuState(
        cpuid=[Leaf(*parts) for parts in zip(*columns, strict=True)],
        regs={name: fields[name] for name in GENERAL_REGISTERS},
        segments={name: {part: fields[name][part] for part in SEGMENT_PARTS} for name in SEGMENTS},
        gdt=(fields["gdt.base"], fields["gdt.limit"]),
        idt=(fields["idt.base"], fields["idt.limit"]),
        control={name: fields[name] for name in CONTROL_REGISTERS},
        interrupts=list(fields["interrupt_bitmap"]),
        xcrs=_by_number(section, "xcr"),
        xsave=bytes(fields["xsave"]),
        msrs=_by_number(section, "msr"),
        events={name: fields["events"][name] for name in EVENT_PARTS},
        debug=list(fields["debug"]),
        mp_state=fields["mp_state"],
        tsc_khz=fields["tsc_khz"],
    )


def _by_number(section: DeviceState, kind: str) -> dict[int, int]:
    numbers, values = section.fields[f"{kind}_numbers"], section.fields[f"{kind}_values"]
    registers = dict(zip(numbers, values, strict=True))
    if len(registers) != len(numbers):
        name = f"{section.name} {section.instance_id}"
        raise StreamError("a register comes twice", name).inside(f"{kind}_numbers")
    return registers
