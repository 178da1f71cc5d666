"""The description at the end of a stream: made for what is sent, and used to read devices never heard of.

The description is JSON in QEMU's layout: the stream's page size and, for each device section, its fields in
order with their types and sizes. It says what the bytes are, so a `VmStateDescription` can be made from it.
"""

import json
import re
import struct as packing
from collections.abc import Iterable, Iterator
from typing import Any

from sterna.stream.fields import Array, Buffer, Field, Scalar, Unused
from sterna.stream.vmstate import (
    SUBSECTIONS,
    DeviceState,
    Struct,
    VmStateDescription,
    array,
    buffer,
    struct,
    unused,
)
from sterna.stream.wire import (
    SECTION_LIMIT,
    TAKE_LIMIT,
    VMDESC_LIMIT,
    SectionType,
    StreamError,
    StreamUnsupported,
)

VALUE_LIMIT = 1 << 20
"""Most values of all devices together; those of a `virt` machine have 11,500. A value takes some 100 bytes of memory, however few
it has in the stream: none, perhaps, or one.
"""
_SECTION = "vmdesc"
_DEPTH_LIMIT = 16
_OPENING = re.compile(bytes((SectionType.VMDESCRIPTION,)) + rb"(.{4})(?=\{)", re.DOTALL)
_INTEGER = re.compile(r"(u?)int(8|16|32|64)( equal| le)?")
_LETTERS = {8: "b", 16: "h", 32: "i", 64: "q"}
_KNOWN_TYPES = {"bool": "?", "timer": "q", "cpsr": "I", "fpscr": "I", "powered_off": "?"}
_ANY_VERSION = (1 << 32) - 1


def stream_description(sections: Iterable[tuple[VmStateDescription, DeviceState]], page_bytes: int) -> bytes:
    """The description of a stream with these device sections, as JSON text.

    :param page_bytes: the stream's page size
    """
    devices = [description.vmdesc(state) for description, state in sections]
    return json.dumps({"page_size": page_bytes, "devices": devices}).encode()


def find_description(data: bytes | bytearray | memoryview) -> bytes | None:
    """The JSON text at the end of a whole stream in memory, or None if there is none."""
    view = memoryview(data)
    tail = view[max(0, len(view) - VMDESC_LIMIT - 5) :]
    for match in _OPENING.finditer(tail):
        if int.from_bytes(match[1], "big") == len(tail) - match.end():
            return bytes(tail[match.end() :])
    return None


class Descriptions:
    """The devices that a stream's description describes.

    :raise StreamError: When the text is not such a description.
    :raise StreamUnsupported: When it describes more values than are held.
    """

    def __init__(self, text: bytes) -> None:
        try:
            tree = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise StreamError(f"not JSON: {error}", _SECTION) from None
        self.page_bytes = _integer(_object(tree, "the description"), "page_size", 1 << 16)
        devices = _list(tree, "devices")
        if len(devices) > SECTION_LIMIT:
            raise StreamError(f"{len(devices)} devices, the limit is {SECTION_LIMIT}", _SECTION)
        self._devices: dict[tuple[str, int], VmStateDescription] = {}
        for device in devices:
            name = _text(_object(device, "a device"), "name")
            instance_id = _integer(device, "instance_id", 1 << 32)
            self._devices[name, instance_id] = _device(name, device)
        if sum(_state_values(device) for device in self._devices.values()) > VALUE_LIMIT:
            raise StreamUnsupported(f"its devices have more than {VALUE_LIMIT} values", _SECTION)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self._devices)

    def __getitem__(self, key: tuple[str, int]) -> VmStateDescription:
        """The description of the device with this name and instance.

        :raise StreamError: When it is not described.
        """
        try:
            return self._devices[key]
        except KeyError:
            raise StreamError(f"the stream does not describe instance {key[1]}", key[0]) from None


def _device(name: str, tree: dict[str, Any]) -> VmStateDescription:
    try:
        if "vmsd_name" in tree:
            return _describe(tree, 0)
        # A section that was written by a function of its own: QEMU only knows how long it is, not its
        # version.
        fields = tuple(_fields(tree, 0))
        return VmStateDescription(name, _ANY_VERSION, fields, minimum_version=0)
    except StreamError as error:
        raise StreamError(f"device {name!r}: {error.message}", _SECTION) from None


def _describe(tree: dict[str, Any], depth: int) -> VmStateDescription:
    if depth > _DEPTH_LIMIT:
        raise StreamError(f"structures more than {_DEPTH_LIMIT} deep", _SECTION)
    name = _text(tree, "vmsd_name")
    subsections = [
        _describe(_object(sub, "a subsection"), depth + 1) for sub in _list(tree, SUBSECTIONS, missing=[])
    ]
    try:
        return VmStateDescription(
            name, _integer(tree, "version", 1 << 31), tuple(_fields(tree, depth)), tuple(subsections)
        )
    except ValueError as error:
        raise StreamError(str(error), _SECTION) from None


def _fields(tree: dict[str, Any], depth: int) -> Iterator[Field]:
    used = {SUBSECTIONS}
    again: dict[str, int] = {}
    for entry in _list(tree, "fields"):
        name = plain = _text(_object(entry, "a field"), "name")
        if "index" in entry:
            name = plain = f"{name}[{_integer(entry, 'index', TAKE_LIMIT)}]"
        while name in used:
            again[plain] = number = again.get(plain, 0) + 1
            name = plain + ("'" * number if number < 3 else f"'{number}")
        part = _field(name, entry, depth)
        if part.valued:
            used.add(name)
        yield part


def _field(name: str, entry: dict[str, Any], depth: int) -> Field:
    kind = _text(entry, "type")
    size = _integer(entry, "size", TAKE_LIMIT)
    part: Field
    letter = _KNOWN_TYPES.get(kind)
    if match := _INTEGER.fullmatch(kind):
        letter = _LETTERS[int(match[2])].upper() if match[1] else _LETTERS[int(match[2])]
    if kind == "struct":
        part = struct(name, _describe(_object(entry.get("struct"), "a structure"), depth + 1))
    elif kind == "unused_buffer":
        part = unused(size)
    elif letter is not None and packing.calcsize(">" + letter) == size:
        part = Scalar(name, letter, type_name=kind)
    else:
        part = buffer(name, size, type_name=kind)
    if "array_len" not in entry:
        return part
    count = _integer(entry, "array_len", TAKE_LIMIT)
    # Elements of no bytes would cost memory that the stream has not paid for.
    if count * size > TAKE_LIMIT or not _least_bytes(part):
        raise StreamError(f"field {name!r} has {count} elements of {size} bytes", _SECTION)
    return array(part, count)


def _least_bytes(part: Field) -> int:
    """The fewest bytes that the field takes from a stream."""
    match part:
        case Scalar():
            return packing.calcsize(">" + part.code)
        case Buffer() | Unused():
            return part.size
        case Array():
            return part.length * _least_bytes(part.element)
        case Struct():
            return sum(_least_bytes(inner) for inner in part.description.fields)
    raise AssertionError(f"no field of a description is a {type(part).__name__}")


def _state_values(description: VmStateDescription) -> int:
    """How many values a device's state, or a structure, has with all in it; what has no value costs its time."""
    inner = sum(_state_values(sub) for sub in description.subsections)
    return 1 + inner + sum(_values(part) for part in description.fields)


def _values(part: Field) -> int:
    match part:
        case Array():
            return 1 + part.length * _values(part.element)
        case Struct():
            return _state_values(part.description)
    return 1


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise StreamError(f"{what} is not an object", _SECTION)
    return value


def _list(tree: dict[str, Any], key: str, missing: list[Any] | None = None) -> list[Any]:
    value = tree.get(key, missing)
    if not isinstance(value, list):
        raise StreamError(f"{key!r} is not a list", _SECTION)
    return value


def _text(tree: dict[str, Any], key: str) -> str:
    value = tree.get(key)
    if not isinstance(value, str):
        raise StreamError(f"{key!r} is not a text", _SECTION)
    # JSON can spell halves of surrogate pairs, which no name on the wire can have.
    if not value.isascii() and any("\ud800" <= letter <= "\udfff" for letter in value):
        raise StreamError(f"{key!r} is not a text that UTF-8 can carry", _SECTION)
    return value


def _integer(tree: dict[str, Any], key: str, limit: int) -> int:
    value = tree.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= limit:
        raise StreamError(f"{key!r} is not an integer from 0 to {limit}", _SECTION)
    return value
