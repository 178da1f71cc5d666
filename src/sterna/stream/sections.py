"""Writing the stream: pure functions from values to the bytes of each part.

A whole stream is::

    header(configuration)
    section_start(1, "ram", 0, 4) + body + footer(1)
    section_part(1) + body + footer(1)       any number of times
    section_end(1) + body + footer(1)
    section_full(n, name, instance, version) + body + footer(n)       for each device
    end_of_stream()
    vm_description(json)
"""

from dataclasses import dataclass

from sterna.stream.fields import ShortText
from sterna.stream.vmstate import (
    DeviceState,
    VmStateDescription,
    array,
    counted_array,
    u8,
    u32,
)
from sterna.stream.wire import (
    ARM_PAGE_BITS,
    CAPABILITY_LIMIT,
    MACHINE_NAME_LIMIT,
    MAGIC,
    NAME_LIMIT,
    VERSION,
    Command,
    SectionType,
    StreamError,
)

CONFIGURATION_SECTION = "configuration"

_PAGE_BITS = VmStateDescription("configuration/target-page-bits", 1, (u32("target_page_bits"),))
_CAPABILITIES = VmStateDescription(
    "configuration/capabilities",
    1,
    (
        u32("caps_count"),
        counted_array(
            ShortText("capabilities", type_name="capability"), counted_by="caps_count", limit=CAPABILITY_LIMIT
        ),
    ),
)
_UUID = VmStateDescription("configuration/uuid", 1, (array(u8("uuid.data"), 16),))

CONFIGURATION = VmStateDescription(
    CONFIGURATION_SECTION,
    1,
    (u32("len"), counted_array(u8("name"), counted_by="len", limit=MACHINE_NAME_LIMIT)),
    (_PAGE_BITS, _CAPABILITIES, _UUID),
)
"""The configuration section's body."""


@dataclass(frozen=True)
class Configuration:
    """What both ends must agree on before anything else.

    :ivar machine: name of the machine type, such as ``virt-7.2``
    :ivar page_bits: log2 of the page size of RAM records, if it is not the architecture's smallest. For
        32-bit ARM that is 10; QEMU's `virt` sends 12, its `vexpress-a15` nothing
    :ivar uuid: 16 bytes, sent with the capability validate-uuid
    :ivar capabilities: those the destination must have too (of QEMU 7.2: x-ignore-shared)
    """

    machine: str
    page_bits: int | None = ARM_PAGE_BITS
    uuid: bytes | None = None
    capabilities: tuple[str, ...] = ()

    def state(self) -> DeviceState:
        """The section's values."""
        name = self.machine.encode()
        subsections = []
        if self.page_bits is not None:
            subsections.append(DeviceState(_PAGE_BITS.name, 0, 1, {"target_page_bits": self.page_bits}))
        if self.capabilities:
            values = {"caps_count": len(self.capabilities), "capabilities": list(self.capabilities)}
            subsections.append(DeviceState(_CAPABILITIES.name, 0, 1, values))
        if self.uuid is not None:
            subsections.append(DeviceState(_UUID.name, 0, 1, {"uuid.data": list(self.uuid)}))
        values = {"len": len(name), "name": list(name)}
        return DeviceState(CONFIGURATION_SECTION, 0, 1, values, tuple(subsections))

    @staticmethod
    def from_state(state: DeviceState) -> "Configuration":
        """What a decoded section says.

        :raise StreamError: When the machine's name is not UTF-8.
        """
        found = {sub.name: sub.fields for sub in state.subsections}
        try:
            machine = bytes(state.fields["name"]).decode()
        except UnicodeDecodeError:
            raise StreamError("the machine's name is not UTF-8", CONFIGURATION_SECTION) from None
        return Configuration(
            machine,
            found[_PAGE_BITS.name]["target_page_bits"] if _PAGE_BITS.name in found else None,
            bytes(found[_UUID.name]["uuid.data"]) if _UUID.name in found else None,
            tuple(found[_CAPABILITIES.name]["capabilities"]) if _CAPABILITIES.name in found else (),
        )


def header(configuration: Configuration) -> bytes:
    """The first bytes of a stream: magic, version, configuration section.

    :raise StreamError: When the machine's name is too long or the UUID does not have 16 bytes.
    """
    return (
        _be32(MAGIC)
        + _be32(VERSION)
        + bytes((SectionType.CONFIGURATION,))
        + CONFIGURATION.encode(configuration.state())
    )


def section_start(section_id: int, name: str, instance_id: int, version: int) -> bytes:
    """The opening of a section that comes in several parts. Its body and footer follow."""
    return _opening(SectionType.START, section_id, name, instance_id, version)


def section_part(section_id: int) -> bytes:
    """The opening of a further part of a section."""
    return bytes((SectionType.PART,)) + _be32(section_id)


def section_end(section_id: int) -> bytes:
    """The opening of the last part of a section."""
    return bytes((SectionType.END,)) + _be32(section_id)


def section_full(section_id: int, name: str, instance_id: int, version: int) -> bytes:
    """The opening of a section that comes in one piece."""
    return _opening(SectionType.FULL, section_id, name, instance_id, version)


def footer(section_id: int) -> bytes:
    """What ends each part of a section."""
    return bytes((SectionType.FOOTER,)) + _be32(section_id)


def device_section(section_id: int, description: VmStateDescription, state: DeviceState) -> bytes:
    """A device's whole section: opening, body, footer.

    :raise StreamError: When the state does not fit the description.
    """
    return framed(section_id, state, description.encode(state))


def framed(section_id: int, state: DeviceState, body: bytes) -> bytes:
    """A device's whole section around a body that is encoded already."""
    return section_full(section_id, state.name, state.instance_id, state.version) + body + footer(section_id)


def command(kind: Command | int, payload: bytes = b"") -> bytes:
    """A command to the destination.

    :raise StreamError: When the payload is longer than its 16-bit length can say.
    """
    if len(payload) > 0xFFFF:
        raise StreamError(f"command {kind!r}: a payload of {len(payload)} bytes is too long")
    return (
        bytes((SectionType.COMMAND,))
        + int(kind).to_bytes(2, "big")
        + len(payload).to_bytes(2, "big")
        + payload
    )


def end_of_stream() -> bytes:
    """The byte after the last section."""
    return bytes((SectionType.EOF,))


def vm_description(text: bytes) -> bytes:
    """The stream's description of itself, which comes after its end.

    :param text: JSON, see `sterna.stream.description`
    """
    return bytes((SectionType.VMDESCRIPTION,)) + _be32(len(text)) + text


def _opening(kind: SectionType, section_id: int, name: str, instance_id: int, version: int) -> bytes:
    wire_name = name.encode()
    if not 0 < len(wire_name) <= NAME_LIMIT:
        raise StreamError(f"a section's name has 1 to {NAME_LIMIT} bytes, not {len(wire_name)}", name)
    return (
        bytes((kind,))
        + _be32(section_id)
        + bytes((len(wire_name),))
        + wire_name
        + _be32(instance_id)
        + _be32(version)
    )


def _be32(value: int) -> bytes:
    return value.to_bytes(4, "big")
