"""KVM's vCPUs that run an AArch64 guest."""

from sterna.arch.arm import sysreg
from sterna.arch.arm.kvm import init, onereg
from sterna.arch.arm.kvm.vcpu import ArmKvmVcpu
from sterna.arch.arm.kvm.vm import ArmKvmVm
from sterna.arch.arm64.state import Arm64VcpuState
from sterna.hypervisor.kvm.ioctl import Descriptor
from sterna.hypervisor.traits import Rule, Trait

_DOUBLE = (1 << 64) - 1
_NAMED = {
    "sp_el0": onereg.SP,
    "sp_el1": onereg.SP_EL1,
    "elr_el1": onereg.ELR_EL1,
    "pc": onereg.PC,
    "pstate": onereg.PSTATE,
    "fpsr": onereg.FPSR,
    "fpcr": onereg.FPCR,
}
_ID_SPACE = range(sysreg.encode(3, 0, 0, 0, 0), sysreg.encode(3, 0, 0, 7, 7) + 1)
_NAMED_IDS = {
    sysreg.encode(3, 0, 0, 0, 0): "MIDR_EL1",
    sysreg.encode(3, 0, 0, 0, 6): "REVIDR_EL1",
    sysreg.encode(3, 1, 0, 0, 1): "CLIDR_EL1",
    sysreg.encode(3, 1, 0, 0, 7): "AIDR_EL1",
    sysreg.encode(3, 3, 0, 0, 1): "CTR_EL0",
}
_MPIDR = sysreg.encode(3, 0, 0, 0, 5)
"""Differs between the vCPUs of one VM, and is the same on every host."""


def other_registers(vcpu: Descriptor) -> list[int]:
    """All registers that the kernel lists, but for the core ones, which the state has by name, and the counters, which the
    VM's vCPUs share.
    """
    counters = (sysreg.CNTVCT, sysreg.CNTPCT)
    return [id_ for id_ in onereg.list_registers(vcpu) if not onereg.is_core(id_) and id_ not in counters]


class Aarch64KvmVcpu(ArmKvmVcpu):
    """One vCPU of an AArch64 guest."""

    def get_state(self) -> Arm64VcpuState:
        """All registers."""
        self.finish_access()
        counter = self._get(sysreg.CNTVCT)
        system = {register: self._get(register) for register in other_registers(self.fd)}
        lead = self._counters.lead(self.fd)
        if lead is not None:
            system[sysreg.CNTPCT] = counter + lead & _DOUBLE
        return Arm64VcpuState(
            x=[self._get(onereg.general(number)) for number in range(31)],
            **{name: self._get(register) for name, register in _NAMED.items()},
            spsr=[self._get(register) for register in onereg.SPSR.values()],
            v=[self._get(onereg.vector(number)) for number in range(32)],
            system=system,
            counter=counter,
            powered_off=init.is_powered_off(self.fd),
        )

    def set_state(self, state: Arm64VcpuState) -> None:
        """Replace all registers; all but the counter, with which CNTPCT is set."""
        self.finish_access()
        for number, value in enumerate(state.x):
            self._put(onereg.general(number), value)
        for register, value in zip(onereg.SPSR.values(), state.spsr, strict=True):
            self._put(register, value)
        for number, value in enumerate(state.v):
            self._put(onereg.vector(number), value)
        named = {register: getattr(state, name) for name, register in _NAMED.items()}
        for register, value in (named | state.system).items():
            if register == sysreg.CNTPCT:
                self._counters.set_lead(self.fd, value - state.counter)
            else:
                self._put(register, value)
        init.set_powered_off(self.fd, state.powered_off)

    def own_traits(self) -> list[Trait]:
        """What the guest sees of its CPU: the identification registers, which no host lets anyone change, and the versions of the
        kernel's services.
        """
        traits = []
        for register in other_registers(self.fd):
            value = self._get(register)
            if onereg.is_firmware(register):
                traits.append(Trait(f"firmware register {register & 0xFFFF:#x}", Rule.AT_LEAST, value))
            elif (
                register != _MPIDR
                and onereg.is_system(register)
                and (register in _ID_SPACE or register in _NAMED_IDS)
            ):
                name = _NAMED_IDS.get(register, f"ID register {register & 0xFFFF:#x}")
                traits.append(Trait(name, Rule.EQUAL, value))
        return traits

    def _get(self, register: int) -> int:
        return onereg.get(self.fd, register)

    def _put(self, register: int, value: int) -> None:
        onereg.put(self.fd, register, value)


class Arm64KvmVm(ArmKvmVm):
    """A VM for AArch64 guests."""

    vcpu_class = Aarch64KvmVcpu
