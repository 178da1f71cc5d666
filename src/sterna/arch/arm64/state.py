"""The state of an AArch64 vCPU."""

from dataclasses import dataclass, replace

from sterna.arch.arm.sysreg import CNTPCT

_DOUBLE = (1 << 64) - 1


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
