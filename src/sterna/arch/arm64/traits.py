"""What an AArch64 guest may rely on of its host's CPU and KVM."""

from collections.abc import Mapping

from sterna.arch.arm.kvm.onereg import is_firmware, is_system
from sterna.arch.arm.sysreg import encode
from sterna.hypervisor.traits import Rule, Trait

_ID_SPACE = range(encode(3, 0, 0, 0, 0), encode(3, 0, 0, 7, 7) + 1)
_NAMED = {
    encode(3, 0, 0, 0, 0): "MIDR_EL1",
    encode(3, 0, 0, 0, 6): "REVIDR_EL1",
    encode(3, 1, 0, 0, 1): "CLIDR_EL1",
    encode(3, 1, 0, 0, 7): "AIDR_EL1",
    encode(3, 3, 0, 0, 1): "CTR_EL0",
}
_MPIDR = encode(3, 0, 0, 0, 5)
"""Differs between the vCPUs of one VM, and is the same on every host."""


def of_vcpu(registers: Mapping[int, int]) -> list[Trait]:
    """What the guest sees of its CPU: the identification registers, which no host lets anyone change, and the versions of the
    kernel's services.

    :param registers: values by KVM's id
    """
    traits = []
    for register, value in registers.items():
        if is_firmware(register):
            traits.append(Trait(f"firmware register {register & 0xFFFF:#x}", Rule.AT_LEAST, value))
        elif register != _MPIDR and is_system(register) and (register in _ID_SPACE or register in _NAMED):
            name = _NAMED.get(register, f"ID register {register & 0xFFFF:#x}")
            traits.append(Trait(name, Rule.EQUAL, value))
    return traits
