"""The state of an AArch64 vCPU."""

from dataclasses import dataclass, replace

from sterna.arch.arm.dump import flags
from sterna.arch.arm.sysreg import CNTPCT, CNTV_CTL, CNTV_CVAL
from sterna.arch.arm.timer import is_asserted

_DOUBLE = (1 << 64) - 1
_EL1H_MASKED = 0x3C5


@dataclass
class Arm64VcpuState:
    """An AArch64 CPU's registers, named as in the Architecture Reference Manual (ARM DDI 0487, B1.2, C5).

    :ivar x: x0 to x30
    :ivar spsr: SPSR_EL1, SPSR_abt, SPSR_und, SPSR_irq, SPSR_fiq
    :ivar v: v0 to v31, of 128 bits
    :ivar system: all other registers, by KVM's one-reg id (Linux, Documentation/virt/kvm/api.rst, 4.68), without CNTVCT;
        CNTPCT, where a guest has one of its own, as it is when CNTVCT is `counter`
    :ivar counter: CNTVCT at the moment the VM stopped, in ticks
    :ivar powered_off: PSCI has not started this CPU yet, or stopped it
    """

    x: list[int]
    sp_el0: int
    sp_el1: int
    elr_el1: int
    pc: int
    pstate: int
    spsr: list[int]
    v: list[int]
    fpsr: int
    fpcr: int
    system: dict[int, int]
    counter: int
    powered_off: bool = False

    def at(self, counter: int) -> "Arm64VcpuState":
        """The same with another count: CNTPCT is as far ahead of it."""
        system = dict(self.system)
        if CNTPCT in system:
            system[CNTPCT] = system[CNTPCT] + counter - self.counter & _DOUBLE
        return replace(self, system=system, counter=counter)

    @property
    def position(self) -> int:
        """The program counter."""
        return self.pc

    @property
    def timer_line(self) -> bool:
        """Whether the virtual timer asserts its interrupt."""
        return is_asserted(self.system[CNTV_CTL], self.system[CNTV_CVAL], self.counter)

    def begin(self, entry: int) -> None:
        """Go on at `entry` in EL1, exceptions masked."""
        self.pc, self.pstate = entry, _EL1H_MASKED

    def dump(self) -> str:
        """The core registers, four to a line, then program counter, status and stack pointers."""
        lines = [
            " ".join(f"X{i:02d}={self.x[i]:016x}" for i in range(first, min(first + 4, len(self.x))))
            for first in range(0, len(self.x), 4)
        ]
        lines.append(f"PC={self.pc:016x} PSTATE={self.pstate:08x} {flags(self.pstate)}")
        lines.append(f"SP_EL0={self.sp_el0:016x} SP_EL1={self.sp_el1:016x} ELR_EL1={self.elr_el1:016x}")
        if self.powered_off:
            lines.append("powered off")
        return "\n".join(lines)
