"""Section `pl011`."""

from sterna.machine.devices.pl011 import FIFO_DEPTH, Pl011Registers
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    i32,
    struct,
    u32,
    u64,
)

_CLOCK = VmStateDescription("clock", version=0, fields=(u64("period"),))
_PL011_CLOCK = VmStateDescription("pl011/clock", version=1, fields=(struct("clk", _CLOCK),))

PL011 = VmStateDescription(
    "pl011",
    version=2,
    minimum_version=2,
    fields=(
        *(
            u32(name)
            for name in ("readbuff", "flags", "lcr", "rsr", "cr", "dmacr", "int_enabled", "int_level")
        ),
        array(u32("read_fifo"), FIFO_DEPTH),
        *(u32(name) for name in ("ilpr", "ibrd", "fbrd", "ifl")),
        *(i32(name) for name in ("read_pos", "read_count", "read_trigger")),
    ),
    subsections=(_PL011_CLOCK,),
)

_DIRECT = {
    "lcr": "lcr",
    "rsr": "rsr",
    "cr": "cr",
    "dmacr": "dmacr",
    "int_enabled": "imsc",
    "int_level": "ris",
    "ilpr": "ilpr",
    "ibrd": "ibrd",
    "fbrd": "fbrd",
    "ifl": "ifls",
    "read_pos": "read_pos",
    "read_count": "read_count",
}
"""Fields that are an attribute of the registers."""
_READ_TRIGGER = 1


def save_pl011(registers: Pl011Registers, instance_id: int) -> DeviceState:
    """The section of a UART."""
    fields = {name: getattr(registers, attribute) for name, attribute in _DIRECT.items()}
    fields |= {
        "readbuff": 0,
        "flags": int(registers.flags),
        "read_fifo": list(registers.fifo),
        "read_trigger": _READ_TRIGGER,
    }
    clock = DeviceState(
        _PL011_CLOCK.name, 0, _PL011_CLOCK.version, {"clk": {"period": registers.clock_period}}
    )
    return DeviceState(PL011.name, instance_id, PL011.version, fields, (clock,))


def load_pl011(state: DeviceState) -> Pl011Registers:
    """A UART's registers.

    :raise StreamError: When the position or count of the receive FIFO is beyond its depth.
    """
    fields = state.fields
    registers = Pl011Registers(fifo=list(fields["read_fifo"]))
    for name, attribute in _DIRECT.items():
        setattr(registers, attribute, fields[name])
    for name, limit in (("read_pos", FIFO_DEPTH - 1), ("read_count", registers.depth)):
        if not 0 <= fields[name] <= limit:
            raise StreamError(f"{fields[name]} is beyond {limit}", state.name).inside(name)
    for subsection in state.subsections:
        registers.clock_period = subsection.fields["clk"]["period"]
    return registers
