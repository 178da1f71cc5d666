"""Devices that QEMU's `virt` has and this machine has not: when a guest can leave them behind.

A device that the guest has never touched, or that can neither interrupt it nor reach its memory, does nothing to a guest
that goes on without it. What the state of each must be for that:

============================  ===========================================================================================
section                       harmless as long as
============================  ===========================================================================================
``pflash_cfi01``              it is in read mode: no command, no write cycle, no error (JESD68, CFI)
``pl031``                     its alarm interrupt is disabled (ARM DDI 0224, RTCIMSC)
``pl061``                     none of its interrupts is enabled (ARM DDI 0190, GPIOIE); its pins lead to the power button only
``gpio-key``                  the power button is not being pressed
``fw_cfg``                    no file is selected, none partly read, and no transfer has been asked for
``PCIBUS``                    no INTx line is asserted
PCI functions (``0000:...``)  they decode no addresses and are no bus masters (PCI 3.0, 6.2.2, command register)
``virtio-mmio@...``           the driver has not acknowledged them (virtio 1.1, 2.1: device status 0)
``PCIHost``, ``slirp``,       always: an address latch that nothing here reads, the host's end of a network card that is
``virt_acpi_build``           judged by itself, and a note whether tables have been fetched
============================  ===========================================================================================

Of any other device nobody here can tell.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

from sterna.stream.unmatched import Judgement, RamUse
from sterna.stream.vmstate import DeviceState

_PCI = re.compile(r"[0-9a-f]{4}:[0-9a-f]{2}[0-9a-f:.]*/.+")
_VIRTIO_MMIO = re.compile(r"virtio-mmio@[0-9a-f]{16}/.+")
_FLASH = re.compile(r"virt\.flash[01]")
_FIRMWARE_FILE = re.compile(r"/rom@etc/(acpi/tables|acpi/rsdp|table-loader)")
_FLASH_BYTES = 64 << 20
_FIRMWARE_FILE_LIMIT = 2 << 20
_PCI_RAM_LIMIT = 64 << 20

_PCI_COMMAND = slice(4, 6)
_PCI_ENABLED = 0x7
"""I/O space, memory space, bus master."""
_PCI_CONFIG_BYTES = (256, 4096)
_PCI_VERSION = bytes((0, 0, 0, 2))
_VIRTIO_MMIO_STATUS = 12
"""Where QEMU's section has the device status: after what its transport saves (three words)."""

_Values = Mapping[str, Any]
_RESET = "at reset"


def judge_section(state: DeviceState) -> Judgement:
    """Whether a guest can do without the device that has this section."""
    values = _flat(state)
    if (expected := _EXPECTED.get(state.name)) is not None:
        names, meaning = expected
        for name, harmless in names.items():
            if name not in values:
                if "/" in name:
                    continue  # a subsection that this device does without
                return Judgement(False, f"field {name!r} is missing")
            if values[name] != harmless:
                return Judgement(
                    False, f"field {name!r} is {_show(values[name])}, not {_show(harmless)}: {meaning}"
                )
        return Judgement(True, _RESET)
    if (always := _ALWAYS.get(state.name)) is not None:
        return Judgement(True, always)
    for pattern, judge in _FAMILIES:
        if pattern.fullmatch(state.name):
            return judge(values)
    return Judgement(False, "whether the guest can do without this device cannot be told")


def judge_ram_block(name: str, size: int) -> RamUse | None:
    """What a guest sees of a RAM block that this machine has not; None when the guest cannot do without it."""
    if _FLASH.fullmatch(name) and size == _FLASH_BYTES:
        return RamUse.BLANK
    # The files of fw_cfg, which are read through that device. Of a PCI function only what its base registers map is seen.
    limit = (
        _FIRMWARE_FILE_LIMIT
        if _FIRMWARE_FILE.fullmatch(name)
        else _PCI_RAM_LIMIT
        if _PCI.fullmatch(name)
        else 0
    )
    return RamUse.UNSEEN if size <= limit else None


def _flat(state: DeviceState) -> dict[str, Any]:
    """The values of a section and its subsections, which have field names of their own."""
    values = dict(state.fields)
    for subsection in state.subsections:
        values |= {f"{subsection.name}.{name}": value for name, value in subsection.fields.items()}
    return values


def _judge_pci(values: _Values) -> Judgement:
    config = _pci_config(values)
    if config is None:
        return Judgement(False, "no configuration space is found in it")
    command = int.from_bytes(config[_PCI_COMMAND], "little")
    if command & _PCI_ENABLED:
        return Judgement(False, f"the guest uses it: PCI command register {command:#06x}")
    return Judgement(True, "decodes no addresses")


def _pci_config(values: _Values) -> bytes | None:
    """The configuration space: a field of its own, or after the version in a section that a function of its own wrote."""
    for value in values.values():
        if isinstance(value, dict) and (found := _pci_config(value)) is not None:
            return found
        if isinstance(value, bytes) and len(value) in _PCI_CONFIG_BYTES:
            return value
        if isinstance(value, bytes) and len(value) > len(_PCI_VERSION) + min(_PCI_CONFIG_BYTES):
            return value.removeprefix(_PCI_VERSION) if value.startswith(_PCI_VERSION) else None
    return None


def _judge_virtio_mmio(values: _Values) -> Judgement:
    raw = values.get("virtio")
    status: Any = None
    if isinstance(raw, dict):
        status = raw.get("status")  # a sterna's, which describes its fields
    elif isinstance(raw, bytes) and len(raw) > _VIRTIO_MMIO_STATUS:
        status = raw[_VIRTIO_MMIO_STATUS]
    if not isinstance(status, int):
        return Judgement(False, "no device status is found in it")
    if status:
        return Judgement(False, f"the guest uses it: virtio device status {status:#04x}")
    return Judgement(True, "not acknowledged by a driver")


_EXPECTED: dict[str, tuple[dict[str, Any], str]] = {
    "pflash_cfi01": (
        {"wcycle": 0, "cmd": 0, "status": 0x80, "counter": 0},
        "the flash is in the midst of a command",
    ),
    "pl031": ({"im": 0}, "the clock's alarm interrupt is enabled"),
    "pl061": ({"im": 0}, "interrupts of the GPIO controller are enabled"),
    "gpio-key": ({"timer": -1}, "the power button is being pressed"),
    "fw_cfg": (
        {"cur_entry": 0, "cur_offset[1]": 0, "fw_cfg/dma.dma_addr": 0},
        "a file of the firmware's is being read",
    ),
    "PCIBUS": ({"irq_count": [0, 0, 0, 0]}, "a PCI interrupt is asserted"),
}
"""Values of a harmless device, and what it means when they are others."""
_ALWAYS = {
    "PCIHost": "nothing here reads the address that it holds",
    "slirp": "the host's end of a network card",
    "virt_acpi_build": "a note whether tables have been fetched",
}
_FAMILIES: tuple[tuple[re.Pattern[str], Callable[[_Values], Judgement]], ...] = (
    (_PCI, _judge_pci),
    (_VIRTIO_MMIO, _judge_virtio_mmio),
)


def _show(value: Any) -> str:
    return f"{value:#x}" if isinstance(value, int) and value > 9 else repr(value)[:60]
