"""Device state on the wire: declarative descriptions, and the values they describe.

A description is data, much as QEMU's VMStateDescription: a name, a version, fields in order, and optional
subsections.

    COUNTER = VmStateDescription(
        "counter", version=1, fields=(u32("control"), array(u64("compare"), 4), unused(8), timer("expiry"))
    )

`encode` makes a section's body from a `DeviceState`, `decode` takes one from bytes or from the live stream,
and `vmdesc` describes the body as the JSON at the end of a stream does.
"""

import struct as packing
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

from sterna.stream.body import ByteSource, BytesSource
from sterna.stream.fields import Array, Buffer, Record, Scalar, Unused
from sterna.stream.fields import Field as Field
from sterna.stream.wire import NAME_LIMIT, SectionType
from sterna.stream.wire import StreamError as StreamError

SUBSECTIONS = "subsections"
"""Key under which the value of a structure keeps its subsections, if it has any."""


@dataclass(frozen=True)
class DeviceState:
    """The state of one device: what a section of the stream carries.

    :ivar name: the section's name; of a subsection, its full name such as ``cpu/vfp``
    :ivar fields: values by field name; lists for arrays, dictionaries for structures
    """

    name: str
    instance_id: int
    version: int
    fields: dict[str, Any]
    subsections: "tuple[DeviceState, ...]" = field(default=())


@dataclass(frozen=True)
class VmStateDescription:
    """What a section's body consists of.

    :ivar name: as QEMU's ``vmsd_name``; the section itself may carry a longer name (a device's path before
        it)
    :ivar version: the newest version, which is written
    :ivar minimum_version: the oldest version that is read
    """

    name: str
    version: int
    fields: tuple[Field, ...]
    subsections: "tuple[VmStateDescription, ...]" = ()
    minimum_version: int = field(default=-1)

    def __post_init__(self) -> None:
        if self.minimum_version < 0:
            object.__setattr__(self, "minimum_version", self.version)
        names = [part.name for part in self.fields if part.valued]
        double = {name for name, count in Counter(names).items() if count > 1}
        if double or SUBSECTIONS in names:
            raise ValueError(f"description {self.name!r}: field names {double or SUBSECTIONS} are not free")
        for i, part in enumerate(self.fields):
            counted_by = getattr(part, "counted_by", None)
            if counted_by is not None and counted_by not in [before.name for before in self.fields[:i]]:
                raise ValueError(f"description {self.name!r}: no field {counted_by!r} before {part.name!r}")
        for sub in self.subsections:
            longer = sub.name.startswith(self.name) and sub.name != self.name
            if not longer or len(sub.name.encode()) > NAME_LIMIT:
                raise ValueError(
                    f"description {self.name!r}: {sub.name!r} cannot be the name of a subsection"
                )

    @cached_property
    def _subsection_by_name(self) -> "dict[str, VmStateDescription]":
        return {sub.name: sub for sub in self.subsections}

    def encode(self, state: DeviceState) -> bytes:
        """The body of a section with this state, in the state's version.

        :raise StreamError: When a value is missing, unknown, or does not fit its field.
        """
        out = bytearray()
        try:
            self._write(out, state.version, state.fields, state.subsections)
        except StreamError as error:
            error.section = error.section or state.name
            raise
        return bytes(out)

    def decode(
        self,
        source: ByteSource | bytes | bytearray | memoryview,
        *,
        name: str | None = None,
        instance_id: int = 0,
        version: int | None = None,
    ) -> DeviceState:
        """The state that a section's body carries. Of a live source, exactly the body is taken; bytes must be
        nothing but the body.

        :param name: the section's name, if it is not the description's
        :param version: the version from the section's header; the description's if not given
        :raise StreamError: When the version is not supported, or the body is cut short, too long, or out of
            limits.
        """
        name = self.name if name is None else name
        version = self.version if version is None else version
        if isinstance(source, bytes | bytearray | memoryview):
            whole = BytesSource(source, name)
            values, subsections = self._read(whole, version)
            if whole.left:
                raise whole.error(f"{whole.left} bytes after the last field")
        else:
            values, subsections = self._read(source, version)
        return DeviceState(name, instance_id, version, values, subsections)

    def vmdesc(self, state: DeviceState) -> dict[str, Any]:
        """How a stream's description shows a section with this state (its arrays' lengths and
        the subsections that are there), in QEMU's layout.
        """
        return {
            "name": state.name,
            "instance_id": state.instance_id,
            **self._describe(state.version, state.fields, state.subsections),
        }

    def _present(self, version: int) -> Iterable[Field]:
        return (part for part in self.fields if part.since <= version)

    def _check_version(self, version: int, source: ByteSource | None = None) -> None:
        if not self.minimum_version <= version <= self.version:
            raise _error(
                f"version {version} of {self.name!r} is not supported: "
                f"known are {self.minimum_version} to {self.version}",
                source,
            )

    def _write(
        self, out: bytearray, version: int, record: Record, subsections: Iterable[DeviceState]
    ) -> None:
        self._check_version(version)
        unknown = set(record) - {part.name for part in self.fields} - {SUBSECTIONS}
        if unknown:
            raise StreamError(f"{self.name!r} has no field {min(unknown)!r}")
        for part in self._present(version):
            try:
                if part.valued and part.name not in record:
                    raise StreamError("the value is missing")
                part.write(out, record.get(part.name), record)
            except StreamError as error:
                raise error.inside(part.name) from None
        states = {sub.name: sub for sub in subsections}
        for sub in self.subsections:
            if (state := states.pop(sub.name, None)) is None:
                continue
            name = sub.name.encode()
            out += bytes((SectionType.SUBSECTION, len(name))) + name + state.version.to_bytes(4, "big")
            try:
                sub._write(out, state.version, state.fields, state.subsections)
            except StreamError as error:
                raise error.inside(f"<{sub.name}>") from None
        if states:
            raise StreamError(f"{self.name!r} has no subsection {min(states)!r}")

    def _read(
        self, source: ByteSource, version: int, nested: bool = False
    ) -> tuple[dict[str, Any], tuple[DeviceState, ...]]:
        self._check_version(version, source)
        record: dict[str, Any] = {}
        for part in self._present(version):
            try:
                value = part.read(source, record)
            except StreamError as error:
                raise error.inside(part.name) from None
            if part.valued:
                record[part.name] = value
        # What follows a structure may look like a subsection by chance; none is looked for where none can be.
        return record, tuple(self._read_subsections(source, nested)) if self.subsections or not nested else ()

    def _read_subsections(self, source: ByteSource, nested: bool) -> Iterable[DeviceState]:
        seen: set[str] = set()
        while (name := self._peek_subsection(source, nested)) is not None:
            sub = self._subsection_by_name.get(name)
            if sub is None:
                raise _error(f"unknown subsection {name!r}", source)
            if name in seen:
                raise _error(f"subsection {name!r} comes twice", source)
            seen.add(name)
            source.take(2 + len(name.encode()))
            version = int.from_bytes(source.take(4), "big")
            try:
                values, inner = sub._read(source, version)
            except StreamError as error:
                raise error.inside(f"<{name}>") from None
            yield DeviceState(name, 0, version, values, inner)

    def _peek_subsection(self, source: ByteSource, nested: bool) -> str | None:
        """Name of the subsection that comes next, if one of this description does.

        Within a structure the byte after the last field may be anything, so no more is looked at than proves
        that a subsection comes.
        """
        prefix = self.name.encode()
        if source.peek(1) != bytes((SectionType.SUBSECTION,)):
            return None
        for size in (2, 2 + len(prefix)):
            head = source.peek(size)
            if len(head) < size:
                break
            if head[1] <= len(prefix) or head[2:] != prefix[: size - 2]:
                return None
        else:
            size = 2 + head[1]
            head = source.peek(size)
        if len(head) == size:
            return head[2:].decode("utf-8", "backslashreplace")
        if not nested:
            source.take(size)  # raises: the stream is cut short within the subsection's name
        return None

    def _describe(self, version: int, record: Record, subsections: Iterable[DeviceState]) -> dict[str, Any]:
        entries = [
            entry for part in self._present(version) for entry in part.describe(record.get(part.name), record)
        ]
        description: dict[str, Any] = {"vmsd_name": self.name, "version": version, "fields": entries}
        states = {sub.name: sub for sub in subsections}
        inner = [
            sub._describe(states[sub.name].version, states[sub.name].fields, states[sub.name].subsections)
            for sub in self.subsections
            if sub.name in states
        ]
        if inner:
            description["subsections"] = inner
        return description


def _error(message: str, source: ByteSource | None) -> StreamError:
    if source is None:
        return StreamError(message)
    return StreamError(message, source.section, source.offset)


@dataclass(frozen=True)
class Struct(Field):
    """A structure within a section. Its value is a dictionary."""

    description: VmStateDescription

    @property
    def compressible(self) -> bool:
        return not self.description.subsections and all(part.compressible for part in self.description.fields)

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        if not isinstance(value, dict):
            raise StreamError(f"a {type(value).__name__} is not the dictionary of a structure")
        self.description._write(out, self.description.version, value, value.get(SUBSECTIONS, ()))

    def read(self, source: ByteSource, record: Record) -> dict[str, Any]:
        values, subsections = self.description._read(source, self.description.version, nested=True)
        if subsections:
            values[SUBSECTIONS] = subsections
        return values

    @cached_property
    def _packed(self) -> tuple[packing.Struct, list[str], list[str]] | None:
        """Layout, names of all fields and names of the boolean ones, of a structure made of scalars only."""
        fields = list(self.description._present(self.description.version))
        scalars = [part for part in fields if isinstance(part, Scalar)]
        if self.description.subsections or not fields or len(scalars) != len(fields):
            return None
        layout = packing.Struct(">" + "".join(part.code for part in scalars))
        booleans = [part.name for part in scalars if part.code == "?"]
        return layout, [part.name for part in scalars], booleans

    def write_many(self, out: bytearray, values: Any, record: Record) -> None:
        # Where not all fit, the element-wise way finds the culprit.
        if self._packed is None or not self._write_packed(out, values):
            super().write_many(out, values, record)

    def _write_packed(self, out: bytearray, values: Any) -> bool:
        """Append all structures, if they all fit; one by one, each field takes its time."""
        assert self._packed is not None
        layout, names, booleans = self._packed
        try:
            pieces = [layout.pack(*[value[name] for name in names]) for value in values]
            fit = all(len(value) == len(names) for value in values)
            fit = fit and all(value[name] in (0, 1) for name in booleans for value in values)
        except (packing.error, KeyError, TypeError):
            return False
        if fit:
            out += b"".join(pieces)
        return fit

    def read_many(self, source: ByteSource, record: Record, count: int) -> list[Any]:
        if self._packed is None:
            return super().read_many(source, record, count)
        layout, names, _ = self._packed
        return [
            dict(zip(names, row, strict=True)) for row in layout.iter_unpack(source.take(count * layout.size))
        ]

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        out = bytearray()
        self.write(out, value, record)
        inner = self.description._describe(self.description.version, value, value.get(SUBSECTIONS, ()))
        return [{"name": self.name, "type": "struct", "struct": inner, "size": len(out)}]


# Integers of so many bits, unsigned and signed.
u8 = partial(Scalar, code="B", type_name="uint8")
u16 = partial(Scalar, code="H", type_name="uint16")
u32 = partial(Scalar, code="I", type_name="uint32")
u64 = partial(Scalar, code="Q", type_name="uint64")
i8 = partial(Scalar, code="b", type_name="int8")
i16 = partial(Scalar, code="h", type_name="int16")
i32 = partial(Scalar, code="i", type_name="int32")
i64 = partial(Scalar, code="q", type_name="int64")
boolean = partial(Scalar, code="?", type_name="bool")
"""One byte that is 0 or 1."""
timer = partial(Scalar, code="q", type_name="timer")
"""When a timer expires in ns of the guest's virtual clock, or -1: a signed 64-bit integer."""


def buffer(name: str, size: int, *, since: int = 0, type_name: str = "buffer") -> Field:
    """Exactly `size` bytes."""
    return Buffer(name, size, since=since, type_name=type_name)


def counted_buffer(name: str, *, counted_by: str, limit: int, since: int = 0) -> Field:
    """As many bytes as the field `counted_by` before it says, at most `limit`."""
    return Buffer(name, limit, counted_by, since=since, type_name="buffer")


def unused(size: int, *, since: int = 0) -> Field:
    """`size` bytes of padding."""
    return Unused("unused", size, since=since, type_name="unused_buffer")


def array(element: Field, length: int, *, as_numpy: bool = False) -> Field:
    """`length` elements, named as the element is. The element may be a structure."""
    return Array(element.name, element, length, None, as_numpy, since=element.since)


def counted_array(element: Field, *, counted_by: str, limit: int, as_numpy: bool = False) -> Field:
    """As many elements as the field `counted_by` before it says, at most `limit`.

    :param as_numpy: read into a numpy array in this machine's byte order; writing takes lists and numpy
        arrays alike
    """
    return Array(element.name, element, limit, counted_by, as_numpy, since=element.since)


def struct(name: str, description: VmStateDescription, *, since: int = 0) -> Field:
    """A structure with a description of its own."""
    return Struct(name, description, since=since, type_name="struct")
