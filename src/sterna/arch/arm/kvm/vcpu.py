"""An arm64 vCPU, whatever its guest: its own exits, and its interrupt line."""

import errno
from collections.abc import Iterable

from sterna.arch.arm.kvm import onereg
from sterna.arch.arm.kvm.counter import Counters
from sterna.arch.arm.kvm.vgic import Vgic
from sterna.hypervisor.interface import Exit
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.kvm.run import ExitCode
from sterna.hypervisor.kvm.vcpu import KvmVcpu, VcpuOwner
from sterna.hypervisor.traits import Trait


class ArmKvmVcpu(KvmVcpu):
    """One vCPU of an arm64 host; see the interface for its calls.

    :param vgic: what wakes it
    :param counters: the VM's
    """

    def __init__(
        self,
        vm: VcpuOwner,
        vgic: Vgic,
        counters: Counters,
        fd: Descriptor,
        index: int,
        mapping_bytes: int,
    ) -> None:
        super().__init__(vm, fd, index, mapping_bytes)
        self._vgic = vgic
        self._counters = counters

    def own_traits(self) -> Iterable[Trait]:
        """What a guest may rely on of its CPU. One of 32 bits may go on on a CPU of another kind, as on an emulated one."""
        return ()

    def set_interrupt(self, level: bool) -> None:
        """The level of the CPU's interrupt line. High, it ends a `wfi`."""
        self._vgic.set_line(self.index, level)

    def set_timer_wakes(self, enabled: bool) -> None:
        """Nothing to do: an expiry of the virtual timer ends a `wfi` in any case, as the architecture lets it."""

    def _handle_own_exit(self, code: int) -> Exit | None:
        if code == ExitCode.ARM_NISV:
            ipa = self.shared.arm_nisv.fault_ipa
            return self._report(f"access at IPA {ipa:#x} by an instruction that KVM cannot emulate there")
        return self._unexpected(code)

    def _refused(self, error: int) -> Exit:
        if error == errno.ENOSYS:
            return self._report("access outside memory by an instruction that KVM cannot emulate there")
        return super()._refused(error)

    def _where(self) -> str:
        return f"pc {onereg.get(self.fd, onereg.PC):#010x}"
