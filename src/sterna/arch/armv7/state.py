"""The state of an ARMv7 vCPU."""

from dataclasses import dataclass

MODE_MASK = 0x1F
MODES = {0x10: "usr", 0x11: "fiq", 0x12: "irq", 0x13: "svc", 0x17: "abt", 0x1B: "und", 0x1F: "sys"}
"""By CPSR's mode field (ARM DDI 0406C, table B1-1)."""
BANKS = MODES | {0x1F: "usr"}
"""Whose banked registers each mode has: system mode uses those of user mode."""
THUMB = 1 << 5
SVC_MODE_MASKED = 0x1D3
"""CPSR of a CPU that starts: supervisor mode, aborts and interrupts masked."""


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
