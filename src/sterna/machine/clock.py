"""Section `timer`: the machine's clock, in ns. The guest's counter is this clock in its own ticks."""

from collections.abc import Mapping, Sequence

from sterna.machine.devices.device import Apply, Device, SectionKey, Stopped, by_name, nothing
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription, i64, unused

_NS_PER_SECOND = 1_000_000_000
_LIMIT_NS = 1 << 63
"""What fits the section: 292 years."""

TIMER = VmStateDescription(
    "timer", version=2, fields=(i64("cpu_ticks_offset"), unused(8), i64("cpu_clock_offset"))
)


class Clock(Device):
    """The counter as a device of the stream: the machine itself stops it and lets it go on.

    :param hz: the counter's frequency
    """

    descriptions = by_name(TIMER)

    def __init__(self, hz: int) -> None:
        self._hz = hz

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """The counter's section.

        :raise StreamError: When the counter is beyond what the section can say, 292 years.
        """
        clock_ns = counter_to_ns(stopped.counter, self._hz)
        if not 0 <= clock_ns < _LIMIT_NS:
            raise StreamError(
                f"the counter, {stopped.counter} ticks, has no place in the section", TIMER.name
            )
        fields = {"cpu_ticks_offset": 0, "cpu_clock_offset": clock_ns}
        return [DeviceState(TIMER.name, 0, TIMER.version, fields)]

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """The counter, for `stopped`."""
        clock_ns = int(found[TIMER.name, 0].fields["cpu_clock_offset"])
        if clock_ns < 0:
            raise StreamError(f"the clock is negative: {clock_ns} ns", TIMER.name).inside("cpu_clock_offset")
        stopped.counter = ns_to_counter(clock_ns, self._hz)
        return nothing


def counter_to_ns(ticks: int, hz: int) -> int:
    """Ticks of the counter as ns."""
    return ticks * _NS_PER_SECOND // hz


def ns_to_counter(ns: int, hz: int) -> int:
    """ns as whole ticks of the counter."""
    return ns * hz // _NS_PER_SECOND
