"""The sections of a machine: those of its devices, one device after the other."""

from collections.abc import Sequence

from sterna.machine.devices.device import Apply, Device, SectionKey, Stopped, key_text
from sterna.stream.vmstate import DeviceState, StreamError


def save(devices: Sequence[Device], stopped: Stopped) -> list[DeviceState]:
    """The sections of a machine's devices, in the order they are sent."""
    return [state for device in devices for state in device.save(stopped)]


def load(
    states: Sequence[DeviceState], devices: Sequence[Device], stopped: Stopped, board: str, smp: int
) -> Apply:
    """Check a machine's sections as a whole. Nothing is applied.

    :param stopped: is filled from the sections
    :param board: the machine's, for people
    :return: puts them into the devices
    :raise StreamError: When a section is missing, comes twice, belongs to no device of this machine, or has values that the
        device cannot have, or that have no place here.
    """
    by_check = sorted(devices, key=lambda device: not device.chosen)
    found = collect(states, by_check, board, smp)
    loaded = {id(device): device.load(found, stopped) for device in by_check}

    def apply() -> None:
        for device in devices:
            loaded[id(device)]()

    return apply


def collect(
    states: Sequence[DeviceState], devices: Sequence[Device], board: str, smp: int
) -> dict[SectionKey, DeviceState]:
    """The sections by name and instance.

    :raise StreamError: When one is missing, comes twice, or belongs to no device of this machine.
    """
    owners = {key: device for device in devices for key in device.sections()}
    kinds = {name: device for device in devices for name in device.descriptions}
    found: dict[SectionKey, DeviceState] = {}
    for state in states:
        key = (state.name, state.instance_id)
        if key not in owners:
            surplus = kinds[state.name].surplus(key) if state.name in kinds else None
            raise surplus or StreamError(f"this machine ({board}) has no such device", key_text(key))
        if key in found:
            raise StreamError("the section comes twice", key_text(key))
        found[key] = state
    absent = [key for key, device in owners.items() if key not in found and not device.optional]
    if absent:
        key = next((key for key in absent if owners[key].chosen), min(absent))
        raise owners[key].missing(key) or StreamError(
            f"the section is missing; this machine ({board}, {smp} CPUs) has it", key_text(key)
        )
    return found
