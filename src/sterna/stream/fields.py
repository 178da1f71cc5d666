"""The kinds of fields that device state is made of: how each is written, read and described.

A field is written into a `bytearray` and read from a `ByteSource`. Field values live in a dictionary (the
record) by field name, so that an array can be counted by a field before it. Errors are `StreamError`s;
whoever encloses a field adds its name to the error's path.
"""

import operator
import struct as packing
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from sterna.stream.body import ByteSource
from sterna.stream.wire import NAME_LIMIT, StreamError

Record = Mapping[str, Any]
"""Values by field name."""


@dataclass(frozen=True)
class Field(ABC):
    """One field of a description.

    :ivar name: key of its value; as QEMU names it where the section is QEMU's
    :ivar since: first version of the section that has the field
    :ivar type_name: what the stream's description calls its type
    """

    valued: ClassVar[bool] = True
    """Whether the field has a value in the record; padding has none."""

    name: str
    since: int = field(default=0, kw_only=True)
    type_name: str = field(default="", kw_only=True)

    @property
    def compressible(self) -> bool:
        """Whether each element of an array of it looks the same, so that one describes them all."""
        return True

    @abstractmethod
    def write(self, out: bytearray, value: Any, record: Record) -> None:
        """Append the value.

        :raise StreamError: When the value does not fit the field.
        """

    @abstractmethod
    def read(self, source: ByteSource, record: Record) -> Any:
        """Take the value.

        :raise StreamError: When the stream ends, or a count is beyond its limit.
        """

    @abstractmethod
    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        """The field's entries in the stream's description: none for an empty array, more than one for an
        array whose elements differ.
        """

    def write_many(self, out: bytearray, values: Any, record: Record) -> None:
        """Append the values of an array's elements."""
        for i, value in enumerate(values):
            try:
                self.write(out, value, record)
            except StreamError as error:
                raise error.inside(f"[{i}]") from None

    def read_many(self, source: ByteSource, record: Record, count: int) -> list[Any]:
        """Take the values of an array's elements."""
        values = []
        for i in range(count):
            try:
                values.append(self.read(source, record))
            except StreamError as error:
                raise error.inside(f"[{i}]") from None
        return values


@dataclass(frozen=True)
class Scalar(Field):
    """An integer, a boolean or a timer's expiry.

    :ivar code: the type's letter in Python's `struct` module
    """

    code: str

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        if self.code == "?" and value not in (0, 1):
            raise StreamError(f"{value!r} is not a boolean")
        try:
            out += packing.pack(">" + self.code, value if self.code == "?" else operator.index(value))
        except (packing.error, TypeError):
            raise StreamError(f"{value!r} is not a value of type {self.type_name}") from None

    def read(self, source: ByteSource, record: Record) -> Any:
        return packing.unpack(">" + self.code, source.take(packing.calcsize(">" + self.code)))[0]

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        return [{"name": self.name, "type": self.type_name, "size": packing.calcsize(">" + self.code)}]

    def write_many(self, out: bytearray, values: Any, record: Record) -> None:
        # Where not all fit, the element-wise way finds the culprit.
        if self.code == "?" or not self._write_integers(out, values):
            super().write_many(out, values, record)

    def _write_integers(self, out: bytearray, values: Any) -> bool:
        """Append all values at once, if they all fit."""
        if not isinstance(values, np.ndarray):
            try:
                out += packing.pack(f">{len(values)}{self.code}", *values)
            except packing.error:
                return False
            return True
        wire = np.dtype(">" + _NUMPY[self.code])
        limits = np.iinfo(wire)
        if values.ndim != 1 or values.dtype.kind not in "iu":
            return False
        if values.size and not limits.min <= int(values.min()) <= int(values.max()) <= limits.max:
            return False
        out += values.astype(wire).tobytes()
        return True

    def read_many(self, source: ByteSource, record: Record, count: int) -> list[Any]:
        layout = packing.Struct(f">{count}{self.code}")
        return list(layout.unpack(source.take(layout.size)))


@dataclass(frozen=True)
class Buffer(Field):
    """Bytes, their number fixed or given by a field before them.

    :ivar size: how many, or the greatest number when `counted_by` is set
    :ivar counted_by: name of the field before it that says how many there are
    """

    size: int
    counted_by: str | None = None

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        if not isinstance(value, bytes | bytearray | memoryview):
            raise StreamError(f"a {type(value).__name__} is not bytes")
        _check_length(len(value), "bytes", self.size, self.counted_by, record)
        out += value

    def read(self, source: ByteSource, record: Record) -> bytes:
        return source.take(_expected(self.size, self.counted_by, record, source))

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        if self.counted_by is not None and not len(value):
            return []
        return [{"name": self.name, "type": self.type_name, "size": len(value)}]


@dataclass(frozen=True)
class ShortText(Field):
    """Text of at most 255 bytes of UTF-8, its length in a byte before it."""

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        if not isinstance(value, str) or len(value.encode()) > NAME_LIMIT:
            raise StreamError(f"{value!r} is not a text of at most {NAME_LIMIT} bytes")
        raw = value.encode()
        out.append(len(raw))
        out += raw

    def read(self, source: ByteSource, record: Record) -> str:
        at = source.offset
        try:
            return source.take(source.take(1)[0]).decode()
        except UnicodeDecodeError:
            raise StreamError("the text is not UTF-8", source.section, at) from None

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        return [{"name": self.name, "type": self.type_name, "size": 1 + len(value.encode())}]


@dataclass(frozen=True)
class Unused(Field):
    """Bytes that once meant something: written as zeros, ignored when read."""

    valued: ClassVar[bool] = False

    size: int

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        out += bytes(self.size)

    def read(self, source: ByteSource, record: Record) -> None:
        source.take(self.size)

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        return [{"name": self.name, "type": self.type_name, "size": self.size}]


def _expected(most: int, counted_by: str | None, record: Record, source: ByteSource | None = None) -> int:
    """How many elements there are: `most`, or as many as a field says."""
    if counted_by is None:
        return most
    count = int(record[counted_by])
    if not 0 <= count <= most:
        where = (source.section, source.offset) if source is not None else ()
        raise StreamError(f"field {counted_by!r} counts {count} elements, the limit is {most}", *where)
    return count


def _check_length(length: int, what: str, most: int, counted_by: str | None, record: Record) -> None:
    """
    :raise StreamError: When there are other than so many.
    """
    expected = _expected(most, counted_by, record)
    if length != expected:
        says = f"field {counted_by!r} says {expected}" if counted_by else f"{expected} belong"
        raise StreamError(f"{length} {what} where {says}")


@dataclass(frozen=True)
class Array(Field):
    """Elements of one kind, their number fixed or given by a field before them.

    :ivar element: the element's kind; its name is the array's
    :ivar length: number of elements, or the greatest number when `counted_by` is set
    :ivar counted_by: name of the field before it that says how many there are
    :ivar as_numpy: whether reading gives a numpy array (for many integers) and not a list
    """

    element: Field
    length: int
    counted_by: str | None = None
    as_numpy: bool = False

    @property
    def compressible(self) -> bool:
        return self.element.compressible

    def write(self, out: bytearray, value: Any, record: Record) -> None:
        if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
            raise StreamError(f"a {type(value).__name__} is not an array")
        _check_length(len(value), "elements", self.length, self.counted_by, record)
        self.element.write_many(out, value, record)

    def read(self, source: ByteSource, record: Record) -> Any:
        count = _expected(self.length, self.counted_by, record, source)
        if self.as_numpy and isinstance(self.element, Scalar):
            kind = _NUMPY[self.element.code]
            raw = source.take(count * np.dtype(kind).itemsize)
            return np.frombuffer(raw, dtype=">" + kind).astype(kind)
        return self.element.read_many(source, record, count)

    def describe(self, value: Any, record: Record) -> list[dict[str, Any]]:
        if len(value) == 0:
            return []
        if len(value) == 1:
            return self.element.describe(value[0], record)
        if self.compressible:
            return [_with(self.element.describe(value[0], record)[0], "array_len", len(value))]
        return [
            _with(entry, "index", i)
            for i, item in enumerate(value)
            for entry in self.element.describe(item, record)
        ]


_NUMPY = {"B": "u1", "H": "u2", "I": "u4", "Q": "u8", "b": "i1", "h": "i2", "i": "i4", "q": "i8", "?": "?"}


def _with(entry: dict[str, Any], key: str, number: int) -> dict[str, Any]:
    """`entry` with one more key, where QEMU puts it: right after the name."""
    rest = {name: value for name, value in entry.items() if name != "name"}
    return {"name": entry["name"], key: number, **rest}
