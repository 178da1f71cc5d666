"""What a guest may rely on of its host, so that a migration to a host without it can be refused before it begins."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, auto

_CLOSE_PPM = 250
"""Within so much KVM takes two frequencies for the same (arch/x86/kvm/x86.c, tsc_tolerance_ppm)."""


class Rule(Enum):
    """How a host's value must relate to a guest's."""

    EQUAL = auto()
    BITS = auto()
    """The host has every bit that the guest has."""
    AT_LEAST = auto()
    CLOSE = auto()
    """A frequency: the same but for how well it was measured. A host whose value is 0 has any."""


@dataclass(frozen=True)
class Trait:
    """One thing that a guest has seen of its host.

    :ivar name: for people and machines, such as ``CPUID 0x7 EBX``
    :ivar value: 64 bits, without sign
    """

    name: str
    rule: Rule
    value: int


def first_difference(guest: Iterable[Trait], host: Mapping[str, int]) -> str | None:
    """What the host lacks of what the guest has, in one line; None when it can run the guest.

    :param host: values by name
    """
    for trait in guest:
        if trait.name not in host:
            return f"it has no {trait.name}"
        wanted, there = trait.value, host[trait.name]
        if trait.rule is Rule.BITS and wanted & ~there:
            return f"{trait.name}: it lacks bits {wanted & ~there:#x}"
        if trait.rule is Rule.EQUAL and there != wanted:
            return f"{trait.name}: it has {there:#x}, the guest has {wanted:#x}"
        if trait.rule is Rule.AT_LEAST and there < wanted:
            return f"{trait.name}: it has {there}, the guest has {wanted}"
        if trait.rule is Rule.CLOSE and there and abs(there - wanted) * 1_000_000 > wanted * _CLOSE_PPM:
            return f"{trait.name}: it has {there}, the guest has {wanted}"
    return None
