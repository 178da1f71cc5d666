import struct as packing
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.stream.streams import TOY, TOY_STATE

from sterna.stream.body import BytesSource
from sterna.stream.vmstate import (
    SUBSECTIONS,
    DeviceState,
    Field,
    StreamError,
    VmStateDescription,
    array,
    boolean,
    buffer,
    counted_array,
    counted_buffer,
    i8,
    i16,
    i32,
    i64,
    struct,
    timer,
    u8,
    u16,
    u32,
    u64,
    unused,
)

INTEGERS = {
    u8: (0, 2**8 - 1),
    u16: (0, 2**16 - 1),
    u32: (0, 2**32 - 1),
    u64: (0, 2**64 - 1),
    i8: (-(2**7), 2**7 - 1),
    i16: (-(2**15), 2**15 - 1),
    i32: (-(2**31), 2**31 - 1),
    i64: (-(2**63), 2**63 - 1),
    timer: (-(2**63), 2**63 - 1),
}


@st.composite
def described(
    draw: Any, name: str = "device", depth: int = 0
) -> tuple[VmStateDescription, dict[str, Any], Any]:
    """A description with fields of all kinds, values, and the subsections' states."""
    # A structure that began with a subsection could not be told from one before it that ends with it.
    fields: list[Field] = [u8("mark")]
    values: dict[str, Any] = {"mark": 1}
    kinds = ["integer", "boolean", "buffer", "unused", "array", "counted", "counted buffer"]
    kinds += ["struct", "structs"] if depth < 2 else []
    for i, kind in enumerate(draw(st.lists(st.sampled_from(kinds), max_size=5))):
        label = f"f{i}"
        make, (low, high) = draw(
            st.sampled_from(sorted(INTEGERS.items(), key=lambda item: item[0]("").type_name))
        )
        numbers = st.integers(low, high)
        if kind == "integer":
            fields.append(make(label))
            values[label] = draw(numbers)
        elif kind == "boolean":
            fields.append(boolean(label))
            values[label] = draw(st.booleans())
        elif kind == "buffer":
            values[label] = draw(st.binary(max_size=9))
            fields.append(buffer(label, len(values[label])))
        elif kind == "unused":
            fields.append(unused(draw(st.integers(0, 5))))
        elif kind == "array":
            values[label] = draw(st.lists(numbers, max_size=4))
            fields.append(array(make(label), len(values[label])))
        elif kind == "counted":
            values[label] = draw(st.lists(numbers, max_size=4))
            values[label + "n"] = len(values[label])
            fields += [u16(label + "n"), counted_array(make(label), counted_by=label + "n", limit=4)]
        elif kind == "counted buffer":
            values[label] = draw(st.binary(max_size=4))
            values[label + "n"] = len(values[label])
            fields += [u8(label + "n"), counted_buffer(label, counted_by=label + "n", limit=4)]
        else:
            inner, value, subsections = draw(described(name="inner", depth=depth + 1))
            if subsections:
                value[SUBSECTIONS] = subsections
            if kind == "struct":
                fields.append(struct(label, inner))
                values[label] = value
            else:
                fields.append(array(struct(label, inner), 2))
                values[label] = [value, value]
    descriptions, states = [], []
    if depth < 2:
        for i in range(draw(st.integers(0, 2))):
            sub, value, subsections = draw(described(name=f"{name}/s{i}", depth=depth + 1))
            descriptions.append(sub)
            if draw(st.booleans()):
                states.append(DeviceState(sub.name, 0, sub.version, value, subsections))
    version = draw(st.integers(0, 2**31))
    return VmStateDescription(name, version, tuple(fields), tuple(descriptions)), values, tuple(states)


@given(described())
def test_what_is_written_is_read(case: Any) -> None:
    description, values, subsections = case
    state = DeviceState(description.name, 0, description.version, values, subsections)
    assert description.decode(description.encode(state)) == state


@pytest.mark.slow
@given(described(), st.data())
def test_every_change_is_read_or_refused(case: Any, data: Any) -> None:
    description, values, subsections = case
    state = DeviceState(description.name, 0, description.version, values, subsections)
    wire = bytearray(description.encode(state))
    for _ in range(data.draw(st.integers(0, 3))):
        if wire:
            wire[data.draw(st.integers(0, len(wire) - 1))] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(wire)))
    try:
        changed = description.decode(bytes(wire[:cut]))
    except StreamError as error:
        where = (error.section, error.offset is not None)
    else:
        assert description.decode(description.encode(changed)) == changed
        return
    assert where == ("device", True)


def test_layout() -> None:
    expected = packing.pack(">I 6B I QQ", 0xDEADBEEF, 0, 0, 1, 1, 2, 0, 2, 5, 2**64 - 1)
    expected += b"\x05\x09toy/extra" + packing.pack(">IQ", 1, 16_000)
    assert TOY.encode(TOY_STATE) == expected


def test_structures_of_arrays_alone_and_of_none_but_scalars() -> None:
    grid = struct("grid", VmStateDescription("row", 1, (array(u16("cells"), 2),)))
    points = struct("points", VmStateDescription("point", 1, (u8("x"), boolean("y"))))
    description = VmStateDescription("d", 1, (array(grid, 2), array(points, 2)))
    fields = {
        "grid": [{"cells": [1, 2]}, {"cells": [3, 4]}],
        "points": [{"x": 5, "y": False}, {"x": 6, "y": True}],
    }
    state = DeviceState("d", 0, 1, fields)
    wire = description.encode(state)
    assert wire == packing.pack(">4H 4B", 1, 2, 3, 4, 5, 0, 6, 1)
    assert description.decode(wire) == state


@pytest.mark.parametrize("make", INTEGERS)
def test_integers_out_of_range_are_refused(make: Any) -> None:
    low, high = INTEGERS[make]
    description = VmStateDescription("d", 1, (make("x"),))
    for value in (low - 1, high + 1, 1.0, "1", None):
        with pytest.raises(StreamError, match=r"section 'd', field 'x': .*not a value of type"):
            description.encode(DeviceState("d", 0, 1, {"x": value}))


@pytest.mark.parametrize(
    ("field", "value", "path"),
    [
        (array(u32("x"), 3), [1, 2, -1], r"x\[2\]"),
        (array(u32("x"), 3), np.array([1, 2, 2**32]), r"x\[2\]"),
        (array(u32("x"), 3), np.array([1, 2, 0.5]), r"x\[0\]"),
        (array(u32("x"), 3), [1, 2], "x"),
        (array(u32("x"), 3), 3, "x"),
        (array(boolean("x"), 2), [True, 2], r"x\[1\]"),
        (boolean("x"), 2, "x"),
        (buffer("x", 3), b"ab", "x"),
        (buffer("x", 3), "abc", "x"),
        (struct("x", TOY), {}, "x.control"),
        (struct("x", TOY), 7, "x"),
        (struct("x", TOY), {**TOY_STATE.fields, "what": 1}, "x"),
        (
            struct("x", TOY),
            {**TOY_STATE.fields, "lines": [{"level": 0, "edge": 7}] * 3},
            r"x.lines\[0\].edge",
        ),
        (
            struct("x", TOY),
            {**TOY_STATE.fields, "lines": [{"level": 256, "edge": 0}] * 3},
            r"x.lines\[0\].level",
        ),
        (struct("x", TOY), {**TOY_STATE.fields, "lines": [{"level": 0}] * 3}, r"x.lines\[0\].edge"),
        (
            struct("x", TOY),
            {**TOY_STATE.fields, "lines": [{"level": 0, "edge": 0, "y": 0}] * 3},
            r"x.lines\[0\]",
        ),
        (struct("x", TOY), {**TOY_STATE.fields, "count": 3}, "x.queue"),
        (struct("x", TOY), {**TOY_STATE.fields, "count": 9, "queue": [0] * 9}, "x.queue"),
    ],
)
def test_values_that_do_not_fit_are_named(field: Field, value: Any, path: str) -> None:
    description = VmStateDescription("d", 1, (field,))
    with pytest.raises(StreamError, match=f"^section 'd', field '{path}': "):
        description.encode(DeviceState("d", 0, 1, {"x": value}))


def test_unknown_and_missing_parts_are_refused() -> None:
    description = VmStateDescription("d", 1, (u8("x"),))
    with pytest.raises(StreamError, match="'d' has no field 'y'"):
        description.encode(DeviceState("d", 0, 1, {"x": 1, "y": 2}))
    with pytest.raises(StreamError, match="field 'x': the value is missing"):
        description.encode(DeviceState("d", 0, 1, {}))
    with pytest.raises(StreamError, match="'d' has no subsection 'd/z'"):
        description.encode(DeviceState("d", 0, 1, {"x": 1}, (DeviceState("d/z", 0, 1, {}),)))
    with pytest.raises(StreamError, match="offset 0x1: unknown subsection 'd/z'"):
        description.decode(b"\1\x05\3d/z\0\0\0\1")
    with pytest.raises(StreamError, match="offset 0x1: 3 bytes after the last field"):
        description.decode(b"\1abc")


def test_a_subsection_may_not_come_twice() -> None:
    wire = TOY.encode(TOY_STATE)
    again = wire[wire.index(b"\x05\x09toy") :]
    with pytest.raises(StreamError, match="subsection 'toy/extra' comes twice"):
        TOY.decode(wire + again)


def test_counts_are_capped_before_anything_is_read() -> None:
    description = VmStateDescription(
        "d", 1, (i64("n"), counted_array(u64("x"), counted_by="n", limit=1 << 20, as_numpy=True))
    )
    for count in (2**63 - 1, (1 << 20) + 1, -1):
        with pytest.raises(StreamError, match=f"field 'x', offset 0x8: field 'n' counts {count} elements"):
            description.decode(count.to_bytes(8, "big", signed=True))
    with pytest.raises(StreamError, match="field 'x', offset 0x8: cut short"):
        description.decode((1 << 20).to_bytes(8, "big"))


def test_large_arrays_come_as_numpy_arrays() -> None:
    numbers = np.random.default_rng(7).integers(0, 2**64, 1 << 20, dtype=np.uint64)
    description = VmStateDescription(
        "d", 1, (u32("n"), counted_array(u64("x"), counted_by="n", limit=1 << 20, as_numpy=True))
    )
    wire = description.encode(DeviceState("d", 0, 1, {"n": 1 << 20, "x": numbers}))
    assert wire[4:12] == int(numbers[0]).to_bytes(8, "big")
    found = description.decode(wire).fields["x"]
    assert found.dtype == np.uint64
    assert found.dtype.isnative
    np.testing.assert_array_equal(found, numbers)
    few = [int(number) for number in numbers[:5]]
    assert description.encode(DeviceState("d", 0, 1, {"n": 5, "x": few})) == b"\0\0\0\5" + wire[4:44]


def test_versions() -> None:
    description = VmStateDescription(
        "d", 3, (u8("a"), u8("b", since=3), array(u8("c"), 2, as_numpy=False)), minimum_version=2
    )
    old = DeviceState("d", 0, 2, {"a": 1, "c": [2, 3]})
    new = DeviceState("d", 0, 3, {"a": 1, "b": 9, "c": [2, 3]})
    assert description.encode(old) == b"\1\2\3"
    assert description.encode(new) == b"\1\x09\2\3"
    assert description.decode(b"\1\2\3", version=2) == old
    assert description.decode(b"\1\x09\2\3") == new
    for version in (1, 4):
        with pytest.raises(
            StreamError, match=f"section 'd', offset 0x0: version {version} of 'd' is not supp"
        ):
            description.decode(b"\1\2\3", version=version)


def test_bytes_after_a_structure_are_not_taken_for_its_subsection() -> None:
    inner = VmStateDescription("in", 1, (u8("a"),))
    outer = VmStateDescription("out", 1, (struct("s", inner), buffer("b", 5)))
    state = DeviceState("out", 0, 1, {"s": {"a": 1}, "b": b"\x05\x03inx"})
    assert outer.decode(outer.encode(state)) == state


def test_a_description_must_make_sense() -> None:
    for fields in (
        (u8("a"), u16("a")),
        (u8(SUBSECTIONS),),
        (counted_array(u8("a"), counted_by="n", limit=1), u8("n")),
    ):
        with pytest.raises(ValueError, match="description 'd'"):
            VmStateDescription("d", 1, fields)
    with pytest.raises(ValueError, match="cannot be the name of a subsection"):
        VmStateDescription("d", 1, (), (VmStateDescription("e/x", 1, ()),))


def test_vmdesc_has_qemus_layout() -> None:
    assert TOY.vmdesc(TOY_STATE) == {
        "name": "toy",
        "instance_id": 1,
        "vmsd_name": "toy",
        "version": 3,
        "fields": [
            {"name": "control", "type": "uint32", "size": 4},
            {
                "name": "lines",
                "array_len": 3,
                "type": "struct",
                "struct": {
                    "vmsd_name": "line",
                    "version": 1,
                    "fields": [
                        {"name": "level", "type": "uint8", "size": 1},
                        {"name": "edge", "type": "bool", "size": 1},
                    ],
                },
                "size": 2,
            },
            {"name": "count", "type": "uint32", "size": 4},
            {"name": "queue", "array_len": 2, "type": "uint64", "size": 8},
        ],
        "subsections": [
            {
                "vmsd_name": "toy/extra",
                "version": 1,
                "fields": [{"name": "clock", "type": "uint64", "size": 8}],
            }
        ],
    }


def test_offsets_count_from_where_the_source_says() -> None:
    source = BytesSource(b"\1\2", "d", offset=0x1000)
    with pytest.raises(StreamError, match="section 'd', field 'x', offset 0x1002: cut short") as caught:
        VmStateDescription("d", 1, (u32("x"),)).decode(source)
    assert (caught.value.section, caught.value.field, caught.value.offset) == ("d", "x", 0x1002)
