"""A CPU's registers as text."""

from sterna.arch.arm.dump import flags
from sterna.arch.arm64.state import Arm64VcpuState


def dump_registers(state: Arm64VcpuState) -> str:
    """The core registers, four to a line, then program counter, status and stack pointers."""
    lines = [
        " ".join(f"X{i:02d}={state.x[i]:016x}" for i in range(first, min(first + 4, len(state.x))))
        for first in range(0, len(state.x), 4)
    ]
    lines.append(f"PC={state.pc:016x} PSTATE={state.pstate:08x} {flags(state.pstate)}")
    lines.append(f"SP_EL0={state.sp_el0:016x} SP_EL1={state.sp_el1:016x} ELR_EL1={state.elr_el1:016x}")
    if state.powered_off:
        lines.append("powered off")
    return "\n".join(lines)
