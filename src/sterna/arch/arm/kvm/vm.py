"""An arm64 VM: without an interrupt controller in the kernel, its counter the generic timer's."""

from collections.abc import Mapping

from sterna.arch.arm.kvm import onereg
from sterna.arch.arm.kvm.counter import Counters, frequency
from sterna.arch.arm.kvm.init import Feature, init_vcpu
from sterna.arch.arm.kvm.vgic import Vgic
from sterna.arch.arm64.kvm import Aarch64KvmVcpu, other_registers
from sterna.arch.arm64.traits import of_vcpu
from sterna.arch.armv7.kvm import Aarch32KvmVcpu
from sterna.arch.armv7.state import COUNTER_TRAIT
from sterna.hypervisor.arguments import integer
from sterna.hypervisor.interface import DirtyLogMode
from sterna.hypervisor.kvm.dirtyring import LARGEST_RING
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.kvm.system import DEVICE, Capability
from sterna.hypervisor.kvm.vm import KvmVm
from sterna.hypervisor.traits import Rule, Trait

_DEFAULT_IPA_BITS = 40

_STATISTICS = {
    "remote_tlb_flush": "flushes",
    "remote_tlb_flush_requests": "flush_requests",
    "exits": "vcpu_exits",
    "mmio_exit_user": "vcpu_mmio_exits",
    "signal_exits": "vcpu_signal_exits",
    "wfi_exit_stat": "vcpu_wfis",
    "hvc_exit_stat": "vcpu_hypercalls",
}


class Arm64KvmVm(KvmVm):
    """A VM on arm64 CPUs; see the interface for its calls.

    The interrupt controller that guests see is not the kernel's: who has it sets the CPUs' interrupt lines.

    :param aarch32: its guests are of 32 bits (ARMv7)
    :param secondaries_off: vCPUs other than 0 wait for PSCI CPU_ON
    """

    cpus: list[Aarch32KvmVcpu | Aarch64KvmVcpu]  # type: ignore[assignment]
    _required = (
        *KvmVm._required,
        Capability.ONE_REG,
        Capability.MP_STATE,
        Capability.ARM_PSCI_0_2,
        Capability.DEVICE_CTRL,
    )

    def __init__(
        self,
        smp: int = 1,
        *,
        aarch32: bool = False,
        secondaries_off: bool = True,
        dirty_log: DirtyLogMode = DirtyLogMode.BITMAP,
        ring_entries: int = LARGEST_RING,
        device: str = DEVICE,
    ) -> None:
        self._aarch32 = aarch32
        self._secondaries_off = secondaries_off
        self.counter_hz = frequency()
        self._counters = Counters()
        super().__init__(smp, dirty_log=dirty_log, ring_entries=ring_entries, device=device)

    def _set_up(self) -> None:
        if self._aarch32:
            self.system.require((Capability.ARM_EL1_32BIT,))
        self._vgic = Vgic(self.fd)

    def _ipa_bits(self) -> int:
        return _DEFAULT_IPA_BITS

    def _make_vcpu(self, fd: Descriptor, index: int, mapping_bytes: int) -> Aarch32KvmVcpu | Aarch64KvmVcpu:
        features = Feature.PSCI_0_2
        if self._aarch32:
            features |= Feature.EL1_32BIT
        if self._secondaries_off and index > 0:
            features |= Feature.POWER_OFF
        init_vcpu(self.fd, fd, features)
        kind = Aarch32KvmVcpu if self._aarch32 else Aarch64KvmVcpu
        cpu: Aarch32KvmVcpu | Aarch64KvmVcpu = kind(
            self, self._vgic, self._counters, fd, index, mapping_bytes
        )
        if index == 0:
            # Now: a vCPU that runs lets no one read its registers.
            self._traits = self._traits_of(fd)
        if index == self._smp - 1:
            self._vgic.start(self._smp)
        return cpu

    def counter(self) -> int:
        """CNTVCT now. No vCPU may be running."""
        return onereg.get(self.cpus[0].fd, onereg.TIMER_COUNTER)

    def set_counter(self, value: int) -> None:
        """Let CNTVCT go on from `value`, and CNTPCT with it, on every vCPU alike."""
        self._counters.set(self.cpus[0].fd, integer("counter", value))

    def _traits_of(self, vcpu: Descriptor) -> list[Trait]:
        traits = [Trait(COUNTER_TRAIT, Rule.EQUAL, self.counter_hz)]
        if not self._aarch32:
            traits += of_vcpu({register: onereg.get(vcpu, register) for register in other_registers(vcpu)})
        return traits

    def guest_traits(self) -> list[Trait]:
        """The counter's frequency, and an AArch64 guest's CPU. One of 32 bits may go on on a CPU of another kind, as on an
        emulated one.
        """
        return self._traits

    def host_traits(self) -> dict[str, int]:
        """What this host has."""
        return {trait.name: trait.value for trait in self._traits}

    def close(self) -> None:
        """Free the VM. No vCPU may be running."""
        super().close()
        self._vgic.close()

    def _name_statistics(self, numbers: Mapping[str, int]) -> dict[str, int]:
        return {ours: numbers[theirs] for theirs, ours in _STATISTICS.items() if theirs in numbers}
