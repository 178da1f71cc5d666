"""An x86_64 VM: without interrupt controllers in the kernel, its counter the VM's clock."""

import ctypes
from collections.abc import Mapping
from typing import ClassVar

from sterna.arch.x86_64.kvm import cpuid, fpu
from sterna.arch.x86_64.kvm.clock import get_clock, set_clock
from sterna.arch.x86_64.kvm.msrs import list_msrs
from sterna.arch.x86_64.kvm.traits import TSC_KHZ
from sterna.arch.x86_64.kvm.vcpu import X86KvmVcpu
from sterna.arch.x86_64.state import CLOCK_HZ
from sterna.hypervisor.arguments import integer
from sterna.hypervisor.kvm.ioctl import Descriptor, io, iow
from sterna.hypervisor.kvm.system import Capability
from sterna.hypervisor.kvm.vm import KvmVm

# Room for what a CPU without unrestricted guest mode needs: three pages and one, below the last 64 KiB under 4 GiB, where no
# board has anything (Documentation/virt/kvm/api.rst, 4.36, 4.41).
_TSS_ADDRESS = 0xFFFB_D000
_IDENTITY_MAP_ADDRESS = 0xFFFB_C000

SET_TSS_ADDR = io("KVM_SET_TSS_ADDR", 0x47)
SET_IDENTITY_MAP_ADDR = iow("KVM_SET_IDENTITY_MAP_ADDR", 0x48, ctypes.c_uint64)


class X86KvmVm(KvmVm):
    """A VM for long-mode guests; see the interface for its calls. Its vCPUs show this host's CPU."""

    counter_hz = CLOCK_HZ
    counters: ClassVar[Mapping[str, str]] = {
        "pages_4k": "pages_4k",
        "pages_2m": "blocks_2m",
        "pages_1g": "blocks_1g",
        "remote_tlb_flush_requests": "flushes",
        "pf_spurious": "faults_spurious",
        "pf_fixed": "faults_fixed",
        "exits": "vcpu_exits",
        "mmio_exits": "vcpu_mmio_exits",
        "signal_exits": "vcpu_signal_exits",
    }
    _required = (
        *KvmVm._required,
        Capability.EXT_CPUID,
        Capability.SET_TSS_ADDR,
        Capability.SET_IDENTITY_MAP_ADDR,
        Capability.ADJUST_CLOCK,
        Capability.GET_TSC_KHZ,
        Capability.MP_STATE,
        Capability.VCPU_EVENTS,
        Capability.DEBUGREGS,
        Capability.XSAVE,
        Capability.XCRS,
    )

    def _set_up(self) -> None:
        self.fd.call(SET_IDENTITY_MAP_ADDR, ctypes.c_uint64(_IDENTITY_MAP_ADDRESS))
        self.fd.call(SET_TSS_ADDR, _TSS_ADDRESS)
        self.cpuid = cpuid.supported_cpuid(self.system)
        self._msr_numbers = list_msrs(self.system)

    def _ipa_bits(self) -> int:
        leaf = next(
            (leaf for leaf in cpuid.supported_cpuid(self.system) if leaf.function == 0x8000_0008), None
        )
        return leaf.eax & 0xFF if leaf is not None else 36

    def _make_vcpu(self, fd: Descriptor, index: int, mapping_bytes: int) -> X86KvmVcpu:
        return X86KvmVcpu(
            self,
            fd,
            index,
            mapping_bytes,
            leaves=cpuid.of_vcpu(self.cpuid, index),
            xsave_bytes=fpu.xsave_bytes(self.fd),
            msr_numbers=self._msr_numbers,
        )

    def counter(self) -> int:
        """The VM's clock, in ns."""
        return get_clock(self.fd)

    def set_counter(self, value: int) -> None:
        """Let the VM's clock go on from `value`. The vCPUs' time records follow when they next run."""
        set_clock(self.fd, integer("counter", value))

    def host_traits(self) -> dict[str, int]:
        """The same of this host."""
        values = super().host_traits()
        if self.system.check(Capability.TSC_CONTROL):
            values[TSC_KHZ] = 0
        return values
