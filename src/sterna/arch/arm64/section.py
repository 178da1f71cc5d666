"""Section `arm64-cpu`: an AArch64 CPU."""

from typing import Any

from sterna.arch.arm64.state import Arm64VcpuState
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    counted_array,
    u8,
    u32,
    u64,
)

_GENERAL, _VECTORS, _SPSRS = 31, 32, 5
_SYSTEM_LIMIT = 4096
_WIDE = ("sp_el0", "sp_el1", "elr_el1", "pc", "pstate")
_NARROW = ("fpsr", "fpcr")
_DOUBLE = (1 << 64) - 1

ARM64_CPU = VmStateDescription(
    "arm64-cpu",
    version=1,
    fields=(
        array(u64("x"), _GENERAL),
        *(u64(name) for name in _WIDE),
        array(u64("spsr"), _SPSRS),
        # Of each register its low half, then its high half.
        array(u64("v"), 2 * _VECTORS),
        *(u32(name) for name in _NARROW),
        u8("powered_off"),
        # All others, by KVM's one-reg id.
        u32("system_count"),
        counted_array(u64("system_ids"), counted_by="system_count", limit=_SYSTEM_LIMIT),
        counted_array(u64("system_values"), counted_by="system_count", limit=_SYSTEM_LIMIT),
    ),
)


def save_cpu(state: Arm64VcpuState, index: int) -> DeviceState:
    """The section of CPU `index`."""
    fields: dict[str, Any] = {name: getattr(state, name) for name in (*_WIDE, *_NARROW)}
    fields |= {
        "x": list(state.x),
        "spsr": list(state.spsr),
        "v": [half for value in state.v for half in (value & _DOUBLE, value >> 64)],
        "powered_off": int(state.powered_off),
        "system_count": len(state.system),
        "system_ids": list(state.system),
        "system_values": list(state.system.values()),
    }
    return DeviceState(ARM64_CPU.name, index, ARM64_CPU.version, fields)


def load_cpu(section: DeviceState, counter: int) -> Arm64VcpuState:
    """A CPU's state from its section. Whether this host's CPU can have it, the hypervisor finds out.

    :param counter: the guest's counter, which has a section of its own
    :raise StreamError: When a register is there twice.
    """
    fields = section.fields
    halves = fields["v"]
    system = dict(zip(fields["system_ids"], fields["system_values"], strict=True))
    if len(system) != fields["system_count"]:
        where = f"{section.name} {section.instance_id}"
        raise StreamError("a register is there twice", where).inside("system_ids")
    return Arm64VcpuState(
        **{name: fields[name] for name in (*_WIDE, *_NARROW)},
        x=list(fields["x"]),
        spsr=list(fields["spsr"]),
        v=[halves[2 * i] | halves[2 * i + 1] << 64 for i in range(_VECTORS)],
        system=system,
        counter=counter,
        powered_off=bool(fields["powered_off"]),
    )
