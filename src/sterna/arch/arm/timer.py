"""The generic timer, which both ARMs have (ARM DDI 0406C, B8; ARM DDI 0487, D11)."""

COUNTER_HZ = 62_500_000
"""Frequency of the counter of emulated CPUs, as in QEMU's `virt` board."""
COUNTER_TRAIT = "Hz of generic timer"
"""Its name among a host's traits."""

ENABLE, _MASKED = 1, 2
"""Bits of CNTV_CTL."""


def is_asserted(control: int, compare: int, counter: int) -> bool:
    """Whether the virtual timer asserts its interrupt (ARM DDI 0406C, B8.1.5; ARM DDI 0487, D11.2.4).

    :param control: CNTV_CTL
    :param compare: CNTV_CVAL
    :param counter: CNTVCT
    """
    return control & (ENABLE | _MASKED) == ENABLE and counter >= compare
