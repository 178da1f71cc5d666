"""A CPU's registers as text."""

from sterna.arch.arm.dump import flags
from sterna.arch.armv7.state import MODE_MASK, MODES, THUMB, ArmVcpuState


def dump_registers(state: ArmVcpuState) -> str:
    """The core registers, four to a line, and the status register with its flags, state and mode."""
    lines = [
        " ".join(f"R{i:02d}={state.regs[i]:08x}" for i in range(first, first + 4))
        for first in range(0, 16, 4)
    ]
    mode = MODES.get(state.cpsr & MODE_MASK)
    shown = f"{'T' if state.cpsr & THUMB else 'A'} {f'{mode}32' if mode else '?'}"
    lines.append(f"PSR={state.cpsr:08x} {flags(state.cpsr)} {shown}")
    if state.powered_off:
        lines.append("powered off")
    return "\n".join(lines)
