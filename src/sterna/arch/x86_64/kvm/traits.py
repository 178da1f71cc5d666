"""What an x86_64 guest may rely on of its host's CPU and KVM."""

from collections.abc import Iterable, Sequence

from sterna.arch.x86_64.state import Leaf
from sterna.hypervisor.traits import Rule, Trait

TSC_KHZ = "kHz of time stamp counter"

_IDENTITY = ((0x0, 0, "ebx"), (0x0, 0, "edx"), (0x0, 0, "ecx"), (0x1, 0, "eax"))
"""Vendor, and family, model and stepping."""
_FEATURES = (
    *((0x1, 0, register) for register in ("ecx", "edx")),
    *((0x7, 0, register) for register in ("ebx", "ecx", "edx")),
    *((0x7, 1, register) for register in ("eax", "edx")),
    *((0xD, 0, register) for register in ("eax", "edx")),
    (0xD, 1, "eax"),
    (0x4000_0001, 0, "eax"),
    *((0x8000_0001, 0, register) for register in ("ecx", "edx")),
    (0x8000_0007, 0, "edx"),
    (0x8000_0008, 0, "ebx"),
    (0x8000_0021, 0, "eax"),
)
"""Registers whose bits are features each (Intel SDM vol. 2, CPUID; AMD APM vol. 3, appendix E; Linux, virt/kvm/x86/cpuid.rst)."""
_OF_THE_MOMENT = {(0x1, 0, "ecx"): 1 << 27, (0x7, 0, "ecx"): 1 << 4}
"""Bits that say what the operating system has switched on: OSXSAVE, OSPKE."""


def of_cpuid(leaves: Iterable[Leaf]) -> list[Trait]:
    """What a guest sees that is shown these leaves."""
    by_number = {(leaf.function, leaf.index): leaf for leaf in leaves}
    traits = []
    for rule, registers in ((Rule.EQUAL, _IDENTITY), (Rule.BITS, _FEATURES)):
        for key in registers:
            function, index, register = key
            leaf = by_number.get((function, index))
            value = 0 if leaf is None else int(getattr(leaf, register)) & ~_OF_THE_MOMENT.get(key, 0)
            name = f"CPUID {function:#x}{f'.{index}' if index else ''} {register.upper()}"
            traits.append(Trait(name, rule, value))
    return traits


def of_vm(leaves: Sequence[Leaf], msrs: Iterable[int], xsave_bytes: int, tsc_khz: int) -> list[Trait]:
    """What the guest of a VM may rely on."""
    return [
        *of_cpuid(leaves),
        Trait("bytes of XSAVE area", Rule.AT_LEAST, xsave_bytes),
        Trait(TSC_KHZ, Rule.CLOSE, tsc_khz),
        *(Trait(f"MSR {number:#x}", Rule.AT_LEAST, 1) for number in msrs),
    ]
