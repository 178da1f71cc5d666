"""What differs between two streams: pages of guest RAM as they were sent last, and fields of devices.

Pages are compared by the digests that a survey keeps, so neither stream is held. How the streams came about
(passes, order, commands) is not compared: two streams are equal when a destination would end up with the same
guest.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from sterna.analysis.findings import SectionSurvey, StreamSurvey
from sterna.analysis.ram_survey import PageSurvey
from sterna.stream.vmstate import SUBSECTIONS, DeviceState

RANGE_LIMIT = 1000
"""Most ranges of pages that are listed for one block; all pages are counted."""
FIELD_LIMIT = 10_000
"""Most fields that are listed; all are counted."""
_BYTES_SHOWN = 32


@dataclass(frozen=True)
class FieldDifference:
    """A value that differs.

    :ivar section: the device, or ``configuration``
    :ivar field: path of the field; empty where a whole section differs or is missing
    :ivar left: the value, as text; None where there is none
    """

    section: str
    field: str
    left: str | None
    right: str | None


@dataclass(frozen=True)
class BlockDifference:
    """Pages that differ in one block.

    :ivar pages: how many
    :ivar ranges: first and last page of each run of them
    :ivar note: why the pages could not be compared
    """

    block: str
    pages: int
    ranges: tuple[tuple[int, int], ...]
    note: str = ""


@dataclass(frozen=True)
class StreamDifference:
    """All that differs.

    :ivar field_count: how many fields differ, listed or not
    """

    blocks: tuple[BlockDifference, ...]
    fields: tuple[FieldDifference, ...]
    field_count: int

    @property
    def equal(self) -> bool:
        return not self.blocks and not self.field_count


def compare(left: StreamSurvey, right: StreamSurvey) -> StreamDifference:
    """Compare two streams that have no fault.

    :param left: a survey with digests
    :param right: the other
    """
    blocks = tuple(_compare_ram(left, right))
    fields: list[FieldDifference] = []
    count = 0
    for difference in _compare_fields(left, right):
        count += 1
        if count <= FIELD_LIMIT:
            fields.append(difference)
    return StreamDifference(blocks, tuple(fields), count)


def _compare_ram(left: StreamSurvey, right: StreamSurvey) -> Iterator[BlockDifference]:
    ours = {block.name: block for block in left.page_surveys}
    theirs = {block.name: block for block in right.page_surveys}
    for name in dict.fromkeys([*ours, *theirs]):
        one, other = ours.get(name), theirs.get(name)
        if one is None or other is None:
            side = "second" if one is None else "first"
            pages = (one or other or ours[name]).pages
            yield BlockDifference(name, pages, ((0, pages - 1),), f"only in the {side} stream")
        elif left.page_bits != right.page_bits or one.pages != other.pages:
            sizes = (one.pages << left.page_bits, other.pages << right.page_bits)
            note = f"{sizes[0]} and {sizes[1]} bytes, in pages of {1 << left.page_bits} and {1 << right.page_bits}"
            yield BlockDifference(name, max(one.pages, other.pages), (), note)
        elif (difference := _compare_pages(one, other)) is not None:
            yield difference


def _compare_pages(one: PageSurvey, other: PageSurvey) -> BlockDifference | None:
    differ = (one.digests != other.digests) | ((one.times > 0) != (other.times > 0))
    pages = np.flatnonzero(differ)
    if not pages.size:
        return None
    ends = np.flatnonzero(np.diff(pages) > 1)
    firsts = pages[np.concatenate(([0], ends + 1))][:RANGE_LIMIT].tolist()
    lasts = pages[np.concatenate((ends, [pages.size - 1]))][:RANGE_LIMIT].tolist()
    return BlockDifference(one.name, int(pages.size), tuple(zip(firsts, lasts, strict=True)))


def _compare_fields(left: StreamSurvey, right: StreamSurvey) -> Iterator[FieldDifference]:
    assert left.configuration, "only streams without a fault are compared"
    assert right.configuration, "only streams without a fault are compared"
    yield from _compare_values("configuration", vars(left.configuration), vars(right.configuration))
    devices, others = (_devices(survey) for survey in (left, right))
    for key in dict.fromkeys([*devices, *others]):
        one, other = devices.get(key), others.get(key)
        name = str((one or other or devices[key]).header)
        if one is None or other is None:
            yield FieldDifference(name, "", _presence(one), _presence(other))
        elif one.state is not None and other.state is not None:
            yield from _compare_values(name, state_values(one.state), state_values(other.state))
        elif (one.digest, one.bytes) != (other.digest, other.bytes):
            texts = (f"{side.bytes} bytes, xxh3 {side.digest:016x}" for side in (one, other))
            yield FieldDifference(name, "", *texts)


def _devices(survey: StreamSurvey) -> dict[tuple[str, int], SectionSurvey]:
    return {
        (section.header.name, section.header.instance_id): section
        for section in survey.sections
        if not section.is_ram
    }


def _presence(section: SectionSurvey | None) -> str | None:
    return None if section is None else f"{section.bytes} bytes"


def state_values(state: DeviceState) -> dict[str, Any]:
    """A device's values as one tree of dictionaries, its version and subsections in angle brackets."""
    return {"<version>": state.version, **state.fields, **_subsection_values(state.subsections)}


def _subsection_values(states: tuple[DeviceState, ...]) -> dict[str, Any]:
    return {f"<{state.name}>": state_values(state) for state in states}


def _children(value: Any) -> dict[str, Any] | None:
    """The parts of a structure or array by their place in a path; None for a plain value."""
    if isinstance(value, dict):
        plain = {f".{name}": part for name, part in value.items() if name != SUBSECTIONS}
        inner = _subsection_values(value.get(SUBSECTIONS, ()))
        return {**plain, **{f".{name}": part for name, part in inner.items()}}
    if isinstance(value, list | tuple):
        return {f"[{i}]": part for i, part in enumerate(value)}
    return None


def _compare_values(section: str, left: Any, right: Any, path: str = "") -> Iterator[FieldDifference]:
    if left == right and type(left) is type(right):
        return
    ours, theirs = _children(left), _children(right)
    if ours is not None and theirs is not None:
        for name in dict.fromkeys([*ours, *theirs]):
            inner = path + name
            if name in ours and name in theirs:
                yield from _compare_values(section, ours[name], theirs[name], inner)
            else:
                sides = (_text(side[name]) if name in side else None for side in (ours, theirs))
                yield FieldDifference(section, inner.removeprefix("."), *sides)
    elif isinstance(left, bytes) and isinstance(right, bytes) and len(left) == len(right):
        differ = np.flatnonzero(np.frombuffer(left, np.uint8) != np.frombuffer(right, np.uint8))
        first, last = int(differ[0]), int(differ[-1]) + 1
        name = f"{path}[{first}:{last}]".removeprefix(".")
        yield FieldDifference(section, name, _text(left[first:last]), _text(right[first:last]))
    else:
        yield FieldDifference(section, path.removeprefix("."), _text(left), _text(right))


def _text(value: Any) -> str:
    """A value for people, of bounded length."""
    if isinstance(value, bytes):
        return value[:_BYTES_SHOWN].hex() + ("..." if len(value) > _BYTES_SHOWN else "")
    if (parts := _children(value)) is not None:
        return f"{len(parts)} values"
    return str(value)
