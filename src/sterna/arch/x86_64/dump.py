"""A CPU's registers as text."""

from sterna.arch.x86_64.state import CONTROL_REGISTERS, SEGMENTS, X86VcpuState


def dump_registers(state: X86VcpuState) -> str:
    """The general registers, four to a line, then segments and control registers."""
    names = list(state.regs)
    lines = [
        " ".join(f"{name.upper():<6}={state.regs[name]:016x}" for name in names[first : first + 4])
        for first in range(0, len(names), 4)
    ]
    for name in SEGMENTS:
        segment = state.segments[name]
        lines.append(
            f"{name.upper():<3}={segment['selector']:04x} {segment['base']:016x} {segment['limit']:08x} "
            f"type {segment['type']:2} DPL {segment['dpl']}{' present' if segment['present'] else ''}"
        )
    lines += [
        f"{name.upper()}={base:016x} {limit:04x}"
        for name, (base, limit) in (("gdt", state.gdt), ("idt", state.idt))
    ]
    lines.append(" ".join(f"{name.upper()}={state.control[name]:x}" for name in CONTROL_REGISTERS))
    if state.events["exception_injected"] or state.events["exception_pending"]:
        lines.append(
            f"exception {state.events['exception_nr']}, error code {state.events['exception_error_code']:#x}"
        )
    return "\n".join(lines)
