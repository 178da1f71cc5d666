"""The state of an ARMv7 vCPU."""

from dataclasses import dataclass, replace

from sterna.arch.arm.dump import flags
from sterna.arch.arm.timer import is_asserted
from sterna.arch.armv7.cp15 import CNTV_CTL, CNTV_CVAL

MODE_MASK = 0x1F
MODES = {0x10: "usr", 0x11: "fiq", 0x12: "irq", 0x13: "svc", 0x17: "abt", 0x1B: "und", 0x1F: "sys"}
"""By CPSR's mode field (ARM DDI 0406C, table B1-1)."""
BANKS = MODES | {0x1F: "usr"}
"""Whose banked registers each mode has: system mode uses those of user mode."""
THUMB = 1 << 5
_SVC_MODE_MASKED = 0x1D3


@dataclass
class ArmVcpuState:
    """An ARMv7 CPU's registers, named as in the Architecture Reference Manual (ARM DDI 0406C, B1.3).

    :ivar regs: r0-r15 of the current mode; r15 is the address of the next instruction
    :ivar cpsr: the program status register, condition flags and Thumb bit included
    :ivar banked: the banked registers by name: ``r8_usr`` .. ``r12_usr``, ``sp_usr``, ``lr_usr``, ``r8_fiq`` .. ``r12_fiq``, and
        ``sp_``, ``lr_``, ``spsr_`` of fiq, irq, svc, abt and und; the bank of the current mode repeats `regs`
    :ivar cp15: system registers by KVM one-reg id (0x4020_0000_000f_xxxx for 32-bit, 0x4030_0000_000f_xxxx for 64-bit ones;
        Documentation/virt/kvm/api.rst, KVM_GET_ONE_REG), without the counter
    :ivar vfp: d0-d31 as 64-bit integers
    :ivar counter: CNTVCT at the moment the VM stopped, in ticks
    :ivar powered_off: PSCI has not started this CPU yet, or stopped it
    """

    regs: list[int]
    cpsr: int
    banked: dict[str, int]
    cp15: dict[int, int]
    vfp: list[int]
    fpscr: int
    fpexc: int
    counter: int
    powered_off: bool = False

    @property
    def position(self) -> int:
        """The program counter."""
        return self.regs[15]

    @property
    def timer_line(self) -> bool:
        """Whether the virtual timer asserts its interrupt."""
        return is_asserted(self.cp15.get(CNTV_CTL, 0), self.cp15.get(CNTV_CVAL, 0), self.counter)

    def begin(self, entry: int) -> None:
        """Go on at `entry` (bit 0: Thumb) in supervisor mode, aborts and interrupts masked."""
        self.regs[15] = entry & ~1
        self.cpsr = _SVC_MODE_MASKED | (THUMB if entry & 1 else 0)

    def at(self, counter: int) -> "ArmVcpuState":
        """The same with another count."""
        return replace(self, counter=counter)

    def dump(self) -> str:
        """The core registers, four to a line, and the status register with its flags, state and mode."""
        lines = [
            " ".join(f"R{i:02d}={self.regs[i]:08x}" for i in range(first, first + 4))
            for first in range(0, 16, 4)
        ]
        mode = MODES.get(self.cpsr & MODE_MASK)
        shown = f"{'T' if self.cpsr & THUMB else 'A'} {f'{mode}32' if mode else '?'}"
        lines.append(f"PSR={self.cpsr:08x} {flags(self.cpsr)} {shown}")
        if self.powered_off:
            lines.append("powered off")
        return "\n".join(lines)
