"""The emulated Cortex-A15: a Unicorn engine, its registers read and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from unicorn import UC_ARCH_ARM, UC_MODE_ARM
from unicorn import arm_const as arm

from sterna.arch.arm import psci
from sterna.arch.arm.timer import COUNTER_HZ, COUNTER_TRAIT
from sterna.arch.armv7 import cp15, stage2
from sterna.arch.armv7.state import MODE_MASK, MODES, THUMB, ArmVcpuState
from sterna.hypervisor.emulated.engine import VMID, Engine
from sterna.hypervisor.emulated.guestmode import NO_ABORT
from sterna.hypervisor.interface import SystemEvent
from sterna.hypervisor.traits import Rule, Trait
from sterna.memory.address import PAGE_SIZE, Ipa

# System registers: struct uc_arm_cp_reg without its value (coprocessor, is64, bank, CRn, CRm, opc1, opc2). Bank 0 is the
# guest's: despite the field's name `sec`, it is the non-secure one.
CpReg = tuple[int, int, int, int, int, int, int]

_SCR: CpReg = (15, 0, 1, 1, 1, 0, 0)  # exists in the other bank only
_NSACR: CpReg = (15, 0, 1, 1, 1, 0, 2)
_HCR: CpReg = (15, 0, 0, 1, 1, 4, 0)
_VTCR: CpReg = (15, 0, 0, 2, 1, 4, 2)
_VTTBR: CpReg = (15, 1, 0, 0, 2, 6, 0)
_HPFAR: CpReg = (15, 0, 0, 6, 0, 4, 4)
_VMPIDR: CpReg = (15, 0, 0, 0, 0, 4, 5)
_CNTVOFF: CpReg = (15, 1, 0, 0, 14, 4, 0)
_CNTVCT: CpReg = (15, 1, 0, 0, 14, 1, 0)

_SCR_NS, _SCR_HCE = 1 << 0, 1 << 8
_NSACR_CP10, _NSACR_CP11 = 1 << 10, 1 << 11


def _words(register: CpReg) -> list[int]:
    """struct uc_arm_cp_reg."""
    cp, is64, secure, crn, crm, opc1, opc2 = register
    return [cp | is64 << 32, secure | crn << 32, crm | opc1 << 32, opc2, 0]


def _named(register: int) -> CpReg:
    """The guest's register that has this id."""
    crn, opc1, crm, opc2 = cp15.decode(register)
    return (15, int(cp15.is_wide(register)), 0, crn, crm, opc1, opc2)


_SAVED = {register: _named(register) for register in cp15.REGISTERS}
_BANKED = {mode: number for number, mode in MODES.items() if mode != "sys"}
_GENERAL = [
    *range(arm.UC_ARM_REG_R0, arm.UC_ARM_REG_R12 + 1),
    arm.UC_ARM_REG_SP,
    arm.UC_ARM_REG_LR,
    arm.UC_ARM_REG_PC,
]
_DOUBLES = [arm.UC_ARM_REG_D0 + i for i in range(32)]

_MPIDR_MULTIPROCESSOR = 0x8000_0000
_SPIN_HINTS = (0xE320F001, 0xE320F002)
"""yield and wfe (ARM DDI 0406C, A8.8.424, A8.8.426)."""
_UDF_MASK, _UDF = 0xFFF0_00F0, 0xE7F0_00F0
"""The permanently undefined instruction (A8.8.247)."""
_SCRATCH_PA = 0x1000
_HALF_IT_BLOCK = bytes.fromhex("04bf 00bf 00bf 00bf")
"""itt eq; nop; nop; nop: emulation is told to end behind the first nop."""


class CortexA15(Engine[ArmVcpuState]):
    """The CPU."""

    model = (UC_ARCH_ARM, UC_MODE_ARM, arm.UC_CPU_ARM_CORTEX_A15, "Cortex-A15")
    ipa_bits = 40
    counter_hz = COUNTER_HZ
    traits = (Trait(COUNTER_TRAIT, Rule.EQUAL, COUNTER_HZ),)
    exceptions: ClassVar[Mapping[int, str]] = {
        2: "a supervisor call (svc)",
        3: "a prefetch abort",
        4: "a data abort",
        7: "a breakpoint (bkpt)",
        13: "a secure monitor call (smc)",
    }
    numbers: ClassVar[Mapping[str, int]] = {
        "system_register": arm.UC_ARM_REG_CP_REG,
        "pc_register": arm.UC_ARM_REG_PC,
        "status_register": arm.UC_ARM_REG_CPSR,
        "thumb": THUMB,
    }
    system: ClassVar[Mapping[str, Sequence[int]]] = {
        name: _words(register)
        for name, register in (("hpfar", _HPFAR), ("cval", _SAVED[cp15.CNTV_CVAL]), ("count", _CNTVCT))
    }
    counter_offset = _CNTVOFF

    def _set_up(self, index: int, root_pa: int) -> None:
        self._make_stops_precise()
        for register, value in (
            # Non-secure, with hvc allowed; then stage 2 on.
            (_SCR, _SCR_NS | _SCR_HCE),
            # The guest's CPACR keeps what it writes about VFP (ARM DDI 0406C, B4.1.111); otherwise it reads as 0.
            (_NSACR, _NSACR_CP10 | _NSACR_CP11),
            (_VMPIDR, _MPIDR_MULTIPROCESSOR | index),
            (_HPFAR, NO_ABORT),
            (_VTCR, stage2.VTCR),
            (_VTTBR, stage2.vttbr(root_pa, VMID)),
            (_HCR, stage2.HCR_VM),
        ):
            self._write(register, value)

    def _make_stops_precise(self) -> None:
        """Let emulation stop between instructions only.

        Code that Unicorn 2.1 translates looks for a stop behind each memory access too. An instruction stopped there is executed
        again when the CPU goes on: a device register is written twice, an ldrd loses its base. It leaves these looks out inside
        a Thumb IT block, and for whatever it translates after one whose end it has not seen; ARM code does not change that. So
        the first code that each engine translates ends inside an IT block.
        """
        uc = self.uc
        cpsr = uc.reg_read(arm.UC_ARM_REG_CPSR)
        uc.mem_map(_SCRATCH_PA, PAGE_SIZE)
        uc.mem_write(_SCRATCH_PA, _HALF_IT_BLOCK)
        uc.emu_start(_SCRATCH_PA | 1, _SCRATCH_PA + 4)
        uc.mem_unmap(_SCRATCH_PA, PAGE_SIZE)
        uc.reg_write(arm.UC_ARM_REG_CPSR, cpsr)

    def _read(self, register: CpReg) -> int:
        return int(self.uc.reg_read(arm.UC_ARM_REG_CP_REG, register))

    def save(self, counter: int, powered_off: bool) -> ArmVcpuState:
        """All registers the guest can see. The CPU's current mode is left as it was."""
        uc = self.uc
        cpsr = int(uc.reg_read(arm.UC_ARM_REG_CPSR))
        regs = [int(uc.reg_read(register)) for register in _GENERAL]
        banked: dict[str, int] = {}
        for mode, number in _BANKED.items():
            uc.reg_write(arm.UC_ARM_REG_CPSR, cpsr & ~MODE_MASK | number)
            banked[f"sp_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_SP))
            banked[f"lr_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_LR))
            if mode in ("usr", "fiq"):
                for i in range(8, 13):
                    banked[f"r{i}_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_R0 + i))
            if mode != "usr":
                banked[f"spsr_{mode}"] = int(uc.reg_read(arm.UC_ARM_REG_SPSR))
        uc.reg_write(arm.UC_ARM_REG_CPSR, cpsr)
        return ArmVcpuState(
            regs=regs,
            cpsr=cpsr,
            banked=banked,
            cp15={one_reg: self._read(register) for one_reg, register in _SAVED.items()},
            vfp=[int(uc.reg_read(register)) for register in _DOUBLES],
            fpscr=int(uc.reg_read(arm.UC_ARM_REG_FPSCR)),
            fpexc=int(uc.reg_read(arm.UC_ARM_REG_FPEXC)),
            counter=counter,
            powered_off=powered_off,
        )

    def restore(self, state: ArmVcpuState) -> None:
        """Set all registers."""
        uc = self.uc
        for one_reg, register in _SAVED.items():
            if one_reg in state.cp15:
                self._write(register, state.cp15[one_reg])
        for mode, number in _BANKED.items():
            uc.reg_write(arm.UC_ARM_REG_CPSR, state.cpsr & ~MODE_MASK | number)
            if mode in ("usr", "fiq"):
                for i in range(8, 13):
                    uc.reg_write(arm.UC_ARM_REG_R0 + i, state.banked[f"r{i}_{mode}"])
            uc.reg_write(arm.UC_ARM_REG_SP, state.banked[f"sp_{mode}"])
            uc.reg_write(arm.UC_ARM_REG_LR, state.banked[f"lr_{mode}"])
            if mode != "usr":
                uc.reg_write(arm.UC_ARM_REG_SPSR, state.banked[f"spsr_{mode}"])
        uc.reg_write(arm.UC_ARM_REG_CPSR, state.cpsr)
        thumb = state.cpsr >> 5 & 1
        for register, value in zip(_GENERAL, state.regs, strict=True):
            uc.reg_write(register, value | thumb if register == arm.UC_ARM_REG_PC else value)
        uc.reg_write(arm.UC_ARM_REG_FPEXC, state.fpexc)
        for register, value in zip(_DOUBLES, state.vfp, strict=True):
            uc.reg_write(register, value)
        uc.reg_write(arm.UC_ARM_REG_FPSCR, state.fpscr)

    def started(self, reset: ArmVcpuState, entry: int, context: int) -> ArmVcpuState:
        """ARM DEN 0022, CPU_ON."""
        state = replace(reset, regs=[context, *reset.regs[1:]])
        state.begin(entry)
        return state

    def hypercall(self, cpus: Sequence[Any], caller: Any) -> SystemEvent | None:
        """PSCI."""
        function, *arguments = (int(self.uc.reg_read(arm.UC_ARM_REG_R0 + i)) for i in range(4))
        events: list[SystemEvent] = []
        result = psci.call(function, arguments, cpus, caller, events.append)
        self.uc.reg_write(arm.UC_ARM_REG_R0, result)
        return events[0] if events else None

    def undefined(self, read: Callable[[Ipa, int], bytes | None]) -> str | None:
        """An undefined instruction, or a hint: Unicorn ends emulation behind a wfe or yield with the same error."""

        def instruction(address: int) -> int | None:
            # The address is taken for an IPA: the guest's own translation is not followed.
            code = read(Ipa(address & ~3), 4)
            return None if code is None else int.from_bytes(code, "little")

        before, code = instruction(self.pc - 4), instruction(self.pc)
        if before in _SPIN_HINTS and (code is None or code & _UDF_MASK != _UDF):
            return None
        return "undefined instruction" + ("" if code is None else f" {code:#010x}")
