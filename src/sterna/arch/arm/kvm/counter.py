"""The generic timer's counters: their frequency on this host, and a VM's two."""

import ctypes
import functools
import mmap

from sterna.arch.arm import sysreg
from sterna.arch.arm.kvm import onereg
from sterna.hypervisor.interface import HypervisorError
from sterna.hypervisor.kvm.ioctl import Descriptor

_MRS_X0_CNTFRQ_EL0 = 0xD53B_E000
_RET = 0xD65F_03C0
_MASK = (1 << 64) - 1
_TRIES = 8


@functools.cache
def frequency() -> int:
    """CNTFRQ_EL0, in Hz. No file of the kernel's has it; programs may read the register (ARM DDI 0487, D13.8.1)."""
    with mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page[:8] = _MRS_X0_CNTFRQ_EL0.to_bytes(4, "little") + _RET.to_bytes(4, "little")
        anchor = ctypes.c_char.from_buffer(page)
        value = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(anchor))()
        del anchor
    return int(value)


class Counters:
    """CNTVCT and CNTPCT of a VM, which its vCPUs share.

    A guest may compare its timers with either. So how far CNTPCT is ahead is the guest's: neither a stop nor a migration
    changes it. A kernel before Linux 6.4 shows guests the host's CNTPCT, and lets nobody set it.
    """

    def __init__(self) -> None:
        self._lead: int | None = None

    def lead(self, vcpu: Descriptor) -> int | None:
        """How many ticks CNTPCT is ahead of CNTVCT, modulo 2**64; None where the kernel has it fixed to the host's."""
        if self._lead is None and sysreg.CNTPCT in onereg.list_registers(vcpu):
            # What passes between the two reads comes on top of it.
            self._lead = min(_read_lead(vcpu) for _ in range(_TRIES))
        return self._lead

    def set_lead(self, vcpu: Descriptor, lead: int) -> None:
        """Let CNTPCT be so far ahead, from the next `set` on.

        :raise HypervisorError: When this host's kernel cannot.
        """
        if self.lead(vcpu) is None:
            raise HypervisorError("register CNTPCT cannot be set on this host: that needs Linux 6.4")
        self._lead = lead & _MASK

    def set(self, vcpu: Descriptor, value: int) -> None:
        """Let CNTVCT go on from `value`, and CNTPCT as far ahead of it as it was."""
        lead = self.lead(vcpu)
        if lead is not None:
            onereg.put(vcpu, sysreg.CNTPCT, value + lead & _MASK)
        onereg.put(vcpu, sysreg.CNTVCT, value)


def _read_lead(vcpu: Descriptor) -> int:
    virtual = onereg.get(vcpu, sysreg.CNTVCT)
    return onereg.get(vcpu, sysreg.CNTPCT) - virtual & _MASK
