"""The state of an ARMv7 vCPU, and what an ARM vCPU answers besides the calls that all have."""

from dataclasses import dataclass
from typing import Protocol

from sterna.hypervisor.interface import Vcpu


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
    :ivar counter: CNTVCT at the moment the VM stopped, in ticks of `COUNTER_HZ`
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


COUNTER_HZ = 62_500_000
"""Frequency of the generic timer, as in QEMU's `virt` board."""


COUNTER_TRAIT = "Hz of generic timer"
"""Its name among a host's traits."""


class ArmInterrupts(Protocol):
    """What an interrupt controller tells a vCPU."""

    def set_interrupt(self, level: bool) -> None:
        """The level of the CPU's interrupt line. While it is high, no `wfi` waits."""
        ...

    def set_timer_wakes(self, enabled: bool) -> None:
        """Whether the virtual timer's interrupt reaches this vCPU, so that its expiry ends a `wfi`."""
        ...


class ArmVcpu(Vcpu, ArmInterrupts, Protocol):
    """A vCPU of an ARMv7 guest."""

    def get_state(self) -> ArmVcpuState:
        """Everything the guest can see of this CPU. Call it while `run` is not running."""
        ...

    def set_state(self, state: ArmVcpuState) -> None:
        """Replace the CPU's state. Call it while `run` is not running."""
        ...
