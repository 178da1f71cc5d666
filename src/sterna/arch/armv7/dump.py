"""A CPU's registers as text."""

from sterna.arch.arm.dump import flags
from sterna.arch.armv7.state import ArmVcpuState

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
    lines.append(f"PSR={state.cpsr:08x} {flags(state.cpsr)} {'T' if state.cpsr & _THUMB else 'A'} {mode}")
    if state.powered_off:
        lines.append("powered off")
    return "\n".join(lines)
