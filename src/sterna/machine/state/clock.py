"""Section `timer`: the machine's clock. The guest's counter is this clock in ticks of 16 ns."""

from sterna.hypervisor.arm import COUNTER_HZ
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription, i64, unused

_NS_PER_TICK = 1_000_000_000 // COUNTER_HZ
_COUNTER_LIMIT = 1 << 59
"""Ticks that fit the section's ns: 292 years."""

TIMER = VmStateDescription(
    "timer", version=2, fields=(i64("cpu_ticks_offset"), unused(8), i64("cpu_clock_offset"))
)


def save_counter(counter: int) -> DeviceState:
    """The section of a stopped machine whose counter shows `counter` ticks.

    :raise StreamError: When the counter is beyond what the section can say, 292 years.
    """
    if not 0 <= counter < _COUNTER_LIMIT:
        raise StreamError(f"the counter, {counter} ticks, has no place in the section", TIMER.name)
    clock_ns = counter_to_ns(counter)
    return DeviceState(TIMER.name, 0, TIMER.version, {"cpu_ticks_offset": 0, "cpu_clock_offset": clock_ns})


def load_counter(state: DeviceState) -> int:
    """The counter, in ticks.

    :raise StreamError: When the clock is negative.
    """
    clock_ns = int(state.fields["cpu_clock_offset"])
    if clock_ns < 0:
        raise StreamError(f"the clock is negative: {clock_ns} ns", TIMER.name).inside("cpu_clock_offset")
    return clock_ns // _NS_PER_TICK


def counter_to_ns(ticks: int) -> int:
    """Ticks of the counter as ns."""
    return ticks * _NS_PER_TICK


def ns_to_counter(ns: int) -> int:
    """ns as whole ticks of the counter."""
    return ns // _NS_PER_TICK
