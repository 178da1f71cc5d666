"""Sections `cpu` and `cpu_common`: an ARMv7 CPU."""

from collections.abc import Collection, Mapping
from typing import Any

from sterna.arch.arm.timer import COUNTER_HZ, ENABLE
from sterna.arch.armv7.cp15 import CNTV_CTL, CNTV_CVAL
from sterna.arch.armv7.state import BANKS, MODE_MASK, ArmVcpuState
from sterna.arch.armv7.wire import from_wire, register_name, to_wire
from sterna.machine.clock import counter_to_ns
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    counted_array,
    i32,
    timer,
    u8,
    u32,
    u64,
    unused,
)

_CPREG_LIMIT = 1024
_VECTORS = 32
_DOUBLES = 32

_VFP = VmStateDescription(
    "cpu/vfp",
    version=3,
    fields=(
        *(array(u64(f"env.vfp.zregs[{i}].d"), 2) for i in range(_VECTORS)),
        u32("env.vfp.xregs[0]"),
        array(u32("env.vfp.xregs"), 14),
        u32("fpscr", type_name="fpscr"),
    ),
)
_THUMB2EE = VmStateDescription("cpu/thumb2ee", version=1, fields=(u32("env.teecr"), u32("env.teehbr")))
_IRQ_LINES = VmStateDescription("cpu/irq-line-state", version=1, fields=(u32("env.irq_line_state"),))


CPU = VmStateDescription(
    "cpu",
    version=22,
    fields=(
        array(u32("env.regs"), 16),
        array(u64("env.xregs"), 32),
        u64("env.pc"),
        u32("cpsr", type_name="cpsr"),
        u32("env.spsr"),
        array(u64("env.banked_spsr"), 8),
        array(u32("env.banked_r13"), 8),
        array(u32("env.banked_r14"), 8),
        array(u32("env.usr_regs"), 5),
        array(u32("env.fiq_regs"), 5),
        array(u64("env.elr_el"), 4),
        array(u64("env.sp_el"), 4),
        i32("cpreg_vmstate_array_len", type_name="int32 le"),
        counted_array(u64("cpreg_vmstate_indexes"), counted_by="cpreg_vmstate_array_len", limit=_CPREG_LIMIT),
        counted_array(u64("cpreg_vmstate_values"), counted_by="cpreg_vmstate_array_len", limit=_CPREG_LIMIT),
        u64("env.exclusive_addr"),
        u64("env.exclusive_val"),
        u64("env.exclusive_high"),
        unused(8),
        u32("env.exception.syndrome"),
        u32("env.exception.fsr"),
        u64("env.exception.vaddress"),
        timer("gt_timer[0]"),
        timer("gt_timer[1]"),
        u8("power_state", type_name="powered_off"),
    ),
    subsections=(_VFP, _THUMB2EE, _IRQ_LINES),
)
CPU_COMMON = VmStateDescription("cpu_common", version=1, fields=(u32("halted"), u32("interrupt_request")))

# Order of the banks in the section. There are two more, of modes that a guest without EL2 and EL3 does not have.
_BANKS = ("usr", "svc", "abt", "und", "irq", "fiq")
_BANK_SLOTS = 8
_HIGH = range(8, 13)
_FPSID = 0x4104_30F0
_MVFR0, _MVFR1 = 0x1011_0222, 0x1111_1111
"""Identification of the Cortex-A15's VFP (ARM DDI 0438, 9.3)."""
# env.vfp.xregs has the VFP's system registers by number, from 2 on.
_FPEXC_AT, _MVFR0_AT, _MVFR1_AT = 6, 5, 4
_NO_RESERVATION = (1 << 64) - 1
_FOREIGN = {"env.xregs": "AArch64", "env.pc": "AArch64", "env.elr_el": "EL2 or EL3", "env.sp_el": "AArch64"}
_POWER_ON, _POWER_OFF, _POWER_ON_PENDING = 0, 1, 2
_IRQ_LINE = 2
_TIMER_OFF = -1
_NEVER_NS = (1 << 63) - 1


def save_cpu(
    state: ArmVcpuState, index: int, interrupted: bool, others: Mapping[int, int]
) -> tuple[DeviceState, DeviceState]:
    """The sections `cpu_common` and `cpu` of CPU `index`.

    :param interrupted: whether the interrupt controller signals an interrupt to it
    :param others: system registers by wire id that a receiver wants to see besides those of the state
    """
    lines = _IRQ_LINE if interrupted else 0
    common = DeviceState(
        CPU_COMMON.name,
        index,
        CPU_COMMON.version,
        {"halted": int(state.powered_off), "interrupt_request": lines},
    )
    bank = BANKS[state.cpsr & MODE_MASK]
    values = to_wire(state.cp15, others)
    fields: dict[str, Any] = {
        "env.regs": list(state.regs),
        "env.xregs": [0] * 32,
        "env.pc": 0,
        "cpsr": state.cpsr,
        "env.spsr": state.banked.get(f"spsr_{bank}", 0),
        "env.banked_spsr": _bank_list(state, "spsr"),
        "env.banked_r13": _bank_list(state, "sp"),
        "env.banked_r14": _bank_list(state, "lr"),
        "env.usr_regs": [state.banked[f"r{i}_usr"] for i in _HIGH],
        "env.fiq_regs": [state.banked[f"r{i}_fiq"] for i in _HIGH],
        "env.elr_el": [0] * 4,
        "env.sp_el": [0] * 4,
        "cpreg_vmstate_array_len": len(values),
        "cpreg_vmstate_indexes": list(values.keys()),
        "cpreg_vmstate_values": list(values.values()),
        "env.exclusive_addr": _NO_RESERVATION,
        "env.exclusive_val": 0,
        "env.exclusive_high": 0,
        "env.exception.syndrome": 0,
        "env.exception.fsr": 0,
        "env.exception.vaddress": 0,
        "gt_timer[0]": _TIMER_OFF,
        "gt_timer[1]": _timer_expiry(state),
        "power_state": _POWER_OFF if state.powered_off else _POWER_ON,
    }
    subsections = (
        DeviceState(_VFP.name, 0, _VFP.version, _save_vfp(state)),
        DeviceState(_THUMB2EE.name, 0, _THUMB2EE.version, {"env.teecr": 0, "env.teehbr": 0}),
        DeviceState(_IRQ_LINES.name, 0, _IRQ_LINES.version, {"env.irq_line_state": lines}),
    )
    return common, DeviceState(CPU.name, index, CPU.version, fields, subsections)


def load_cpu(
    cpu: DeviceState, counter: int, known: Collection[int], others: Mapping[int, int]
) -> tuple[ArmVcpuState, dict[str, str]]:
    """A CPU's state from its section. (`cpu_common` has nothing that a CPU of ours would need.)

    :param counter: the guest's counter, which has a section of its own
    :param known: system registers that the hypervisor keeps
    :param others: values by wire id of registers that it does not keep and that never change
    :return: the state, and by field what has no place in it although the guest may need it
    :raise StreamError: When the mode or power state is not one that our CPUs have, or registers are missing.
    """
    fields = cpu.fields
    cpsr = fields["cpsr"]
    bank = BANKS.get(cpsr & MODE_MASK)
    if bank is None:
        raise StreamError(f"mode {cpsr & MODE_MASK:#x} is not one of an ARMv7 guest", _name(cpu)).inside(
            "cpsr"
        )
    power = fields["power_state"]
    if power not in (_POWER_ON, _POWER_OFF):
        what = (
            "the CPU is just being started" if power == _POWER_ON_PENDING else f"{power} is not a power state"
        )
        raise StreamError(what, _name(cpu)).inside("power_state")
    vfp = next((part.fields for part in cpu.subsections if part.name == _VFP.name), None)
    if vfp is None:
        raise StreamError(f"subsection {_VFP.name!r} is missing", _name(cpu))
    regs = list(fields["env.regs"])
    banked: dict[str, int] = {}
    for number, name in enumerate(_BANKS):
        banked[f"sp_{name}"] = fields["env.banked_r13"][number]
        banked[f"lr_{name}"] = fields["env.banked_r14"][number]
        if name != "usr":
            banked[f"spsr_{name}"] = fields["env.banked_spsr"][number] & 0xFFFF_FFFF
    banked[f"sp_{bank}"], banked[f"lr_{bank}"] = regs[13], regs[14]
    if bank != "usr":
        banked[f"spsr_{bank}"] = fields["env.spsr"]
    for position, i in enumerate(_HIGH):
        banked[f"r{i}_usr"] = fields["env.usr_regs"][position] if bank == "fiq" else regs[i]
        banked[f"r{i}_fiq"] = regs[i] if bank == "fiq" else fields["env.fiq_regs"][position]
    values = dict(zip(fields["cpreg_vmstate_indexes"], fields["cpreg_vmstate_values"], strict=True))
    cp15, registers = from_wire(values, known, others)
    if missing := set(known) - set(cp15):
        raise StreamError(f"system register {min(missing):#x} is missing", _name(cpu)).inside(
            "cpreg_vmstate_indexes"
        )
    state = ArmVcpuState(
        regs=regs,
        cpsr=cpsr,
        banked=banked,
        cp15=cp15,
        vfp=[vfp[f"env.vfp.zregs[{i // 2}].d"][i % 2] for i in range(_DOUBLES)],
        fpscr=vfp["fpscr"],
        fpexc=vfp["env.vfp.xregs"][_FPEXC_AT],
        counter=counter,
        powered_off=power == _POWER_OFF,
    )
    return state, _left_out(cpu, registers, others)


def _left_out(cpu: DeviceState, registers: Mapping[int, int], others: Mapping[int, int]) -> dict[str, str]:
    """What has no place in our state: AArch64, the modes of EL2 and EL3, ThumbEE, and system registers."""
    found: dict[str, str] = {}
    for name, what in _FOREIGN.items():
        if any(fields := cpu.fields[name] if isinstance(cpu.fields[name], list) else [cpu.fields[name]]):
            found[name] = f"{max(fields):#x}: {what}"
    for name in ("env.banked_spsr", "env.banked_r13", "env.banked_r14"):
        for number in range(len(_BANKS), _BANK_SLOTS):
            if value := cpu.fields[name][number]:
                found[f"{name}[{number}]"] = f"{value:#x}: a mode of EL2 or EL3"
    for part in cpu.subsections:
        if part.name == _THUMB2EE.name:
            found |= {
                f"<{part.name}>.{name}": f"{value:#x}: ThumbEE"
                for name, value in part.fields.items()
                if value
            }
    for wire_id, value in registers.items():
        found[f"cpreg_vmstate_values[{wire_id:#x}]"] = (
            f"system register {register_name(wire_id)} is {value:#x}, and always {others.get(wire_id, 0):#x} here"
        )
    return found


def _name(cpu: DeviceState) -> str:
    return f"{cpu.name} {cpu.instance_id}"


def _bank_list(state: ArmVcpuState, kind: str) -> list[int]:
    values = [state.banked.get(f"{kind}_{bank}", 0) for bank in _BANKS]
    return values + [0] * (_BANK_SLOTS - len(values))


def _save_vfp(state: ArmVcpuState) -> dict[str, Any]:
    system = [0] * 14
    system[_FPEXC_AT], system[_MVFR0_AT], system[_MVFR1_AT] = state.fpexc, _MVFR0, _MVFR1
    doubles = [*state.vfp, *[0] * (2 * _VECTORS - len(state.vfp))]
    fields: dict[str, Any] = {f"env.vfp.zregs[{i}].d": doubles[2 * i : 2 * i + 2] for i in range(_VECTORS)}
    return fields | {"env.vfp.xregs[0]": _FPSID, "env.vfp.xregs": system, "fpscr": state.fpscr}


def _timer_expiry(state: ArmVcpuState) -> int:
    """When QEMU's timer behind the virtual timer has to fire, in ns of the clock: -1 when it is off, never once it has."""
    if not state.cp15.get(CNTV_CTL, 0) & ENABLE:
        return _TIMER_OFF
    compare = state.cp15.get(CNTV_CVAL, 0)
    return _NEVER_NS if state.counter >= compare else min(counter_to_ns(compare, COUNTER_HZ), _NEVER_NS)
