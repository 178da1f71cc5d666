"""What a device of a machine is: registers that the guest finds, a section of the stream, and how it stands still.

A device is one class, in one file or folder, with all of that. Its node in the device tree it writes before there is one: a guest
can be loaded when the rest of its machine is not made yet.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from sterna.hypervisor.interface import MmioDevice
from sterna.machine.runstate import RunState
from sterna.memory.address import Ipa
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription

SectionKey = tuple[str, int]
"""A section's name and instance."""
Apply = Callable[[], None]
"""Puts a state that has been checked into a device."""


@dataclass(frozen=True)
class Region:
    """A page-aligned range of guest physical addresses, and what answers there."""

    ipa: Ipa
    size: int
    device: MmioDevice


@dataclass
class Stopped:
    """What the devices of a stopped machine tell each other while they are saved or loaded.

    :ivar counter: the guest's counter, in ticks
    :ivar run_state: the state the machine was in before it stopped for the migration; None when the stream does not say
    :ivar timer_lines: whether each CPU's own timer asserts its interrupt; the CPUs say so when they are saved
    :ivar ignored: names of sections of which what has no place here does not matter
    """

    counter: int = 0
    run_state: RunState | None = None
    timer_lines: Sequence[bool] = ()
    ignored: Collection[str] = ()


class Device:
    """One device. A kind of device says what it has; what it does not say, it has not.

    :ivar regions: where the guest finds its registers
    :ivar descriptions: how its sections are laid out, by name
    :ivar optional: a stream may have none of its sections
    :ivar chosen: the machine's user has chosen to have it, and so it is the first to be checked against a stream
    """

    regions: Sequence[Region] = ()
    descriptions: Mapping[str, VmStateDescription] = {}
    optional = False
    chosen = False

    def sections(self) -> Sequence[SectionKey]:
        """Its sections in a stream."""
        return [(name, 0) for name in self.descriptions]

    def missing(self, key: SectionKey) -> StreamError | None:
        """What to say when a stream has no such section; None for what is said of any device."""
        return None

    def surplus(self, key: SectionKey) -> StreamError | None:
        """What to say of a section that has one of its names and none of its instances; None as `missing`."""
        return None

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """Its sections, in the order they are sent. The device is paused."""
        return []

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check its sections. Nothing is applied.

        :param found: at least those of `sections`, unless they are optional
        :return: puts them into the device
        :raise StreamError: When they say what the device cannot be.
        """
        return nothing

    def pause(self) -> None:
        """Once this returns the device does not touch guest RAM."""

    def resume(self) -> None:
        """Work again."""

    def announce(self, delays: Sequence[float]) -> None:
        """The guest has come here: tell its networks, as soon as it runs.

        :param delays: seconds before each time
        """

    def close(self) -> None:
        """Free what it has of the host's. No vCPU runs."""


def by_name(*descriptions: VmStateDescription) -> dict[str, VmStateDescription]:
    """The descriptions of a device's sections as `Device.descriptions` has them."""
    return {description.name: description for description in descriptions}


def nothing() -> None:
    """Of a section that is for `Stopped` alone, nothing is to be applied."""


def key_text(key: SectionKey) -> str:
    """A section as errors name it."""
    name, instance = key
    return f"{name} {instance}"
