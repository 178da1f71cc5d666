"""A CPU's registers as text."""

from sterna.arch.arm64.state import Arm64VcpuState
from sterna.arch.armv7.state import ArmVcpuState
from sterna.arch.x86_64.state import CONTROL_REGISTERS, SEGMENTS, X86VcpuState

_MODES = {
    0x10: "usr32",
    0x11: "fiq32",
    0x12: "irq32",
    0x13: "svc32",
    0x17: "abt32",
    0x1B: "und32",
    0x1F: "sys32",
}
_MODE_MASK = 0x1F
_THUMB = 1 << 5


def dump_registers(state: ArmVcpuState) -> str:
    """The core registers, four to a line, and the status register with its flags, state and mode."""
    lines = [
        " ".join(f"R{i:02d}={state.regs[i]:08x}" for i in range(first, first + 4))
        for first in range(0, 16, 4)
    ]
    mode = _MODES.get(state.cpsr & _MODE_MASK, "?")
    lines.append(f"PSR={state.cpsr:08x} {_flags(state.cpsr)} {'T' if state.cpsr & _THUMB else 'A'} {mode}")
    if state.powered_off:
        lines.append("powered off")
    return "\n".join(lines)


def dump_arm64_registers(state: Arm64VcpuState) -> str:
    """The core registers, four to a line, then program counter, status and stack pointers."""
    lines = [
        " ".join(f"X{i:02d}={state.x[i]:016x}" for i in range(first, min(first + 4, len(state.x))))
        for first in range(0, len(state.x), 4)
    ]
    lines.append(f"PC={state.pc:016x} PSTATE={state.pstate:08x} {_flags(state.pstate)}")
    lines.append(f"SP_EL0={state.sp_el0:016x} SP_EL1={state.sp_el1:016x} ELR_EL1={state.elr_el1:016x}")
    if state.powered_off:
        lines.append("powered off")
    return "\n".join(lines)


def _flags(status: int) -> str:
    return "".join(
        letter if status >> bit & 1 else "-" for letter, bit in zip("NZCV", (31, 30, 29, 28), strict=True)
    )


def dump_x86_registers(state: X86VcpuState) -> str:
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
