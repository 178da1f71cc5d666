"""An arm64 VM: without an interrupt controller in the kernel, its counter the generic timer's."""

from collections.abc import Mapping
from typing import ClassVar

from sterna.arch.arm import sysreg
from sterna.arch.arm.kvm import onereg
from sterna.arch.arm.kvm.counter import Counters, frequency
from sterna.arch.arm.kvm.init import Feature, init_vcpu
from sterna.arch.arm.kvm.vcpu import ArmKvmVcpu
from sterna.arch.arm.kvm.vgic import Vgic
from sterna.arch.arm.timer import COUNTER_TRAIT
from sterna.hypervisor.arguments import integer
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.kvm.system import Capability
from sterna.hypervisor.kvm.vm import KvmVm
from sterna.hypervisor.traits import Rule, Trait


class ArmKvmVm(KvmVm):
    """A VM on arm64 CPUs; see the interface for its calls. Each kind of guest has its own.

    The interrupt controller that guests see is not the kernel's: who has it sets the CPUs' interrupt lines.

    :cvar vcpu_class: makes its vCPUs
    :cvar features: of its vCPUs
    """

    vcpu_class: ClassVar[type[ArmKvmVcpu]]
    features = Feature.PSCI_0_2
    counters: ClassVar[Mapping[str, str]] = {
        "remote_tlb_flush": "flushes",
        "remote_tlb_flush_requests": "flush_requests",
        "exits": "vcpu_exits",
        "mmio_exit_user": "vcpu_mmio_exits",
        "signal_exits": "vcpu_signal_exits",
        "wfi_exit_stat": "vcpu_wfis",
        "hvc_exit_stat": "vcpu_hypercalls",
    }
    _required = (
        *KvmVm._required,
        Capability.ONE_REG,
        Capability.MP_STATE,
        Capability.ARM_PSCI_0_2,
        Capability.DEVICE_CTRL,
    )

    def _set_up(self) -> None:
        self.counter_hz = frequency()
        self._counters = Counters()
        self._vgic = Vgic(self.fd)

    def _make_vcpu(self, fd: Descriptor, index: int, mapping_bytes: int) -> ArmKvmVcpu:
        off = self._secondaries_off and index > 0
        init_vcpu(self.fd, fd, self.features | Feature.POWER_OFF if off else self.features)
        cpu = self.vcpu_class(self, self._vgic, self._counters, fd, index, mapping_bytes)
        if index == 0:
            # Now: a vCPU that runs lets no one read its registers.
            cpu.traits = [Trait(COUNTER_TRAIT, Rule.EQUAL, self.counter_hz), *cpu.own_traits()]
        if index == self._smp - 1:
            self._vgic.start(self._smp)
        return cpu

    def counter(self) -> int:
        """CNTVCT now. No vCPU may be running."""
        return onereg.get(self.cpus[0].fd, sysreg.CNTVCT)

    def set_counter(self, value: int) -> None:
        """Let CNTVCT go on from `value`, and CNTPCT with it, on every vCPU alike."""
        self._counters.set(self.cpus[0].fd, integer("counter", value))

    def close(self) -> None:
        """Free the VM. No vCPU may be running."""
        super().close()
        self._vgic.close()
