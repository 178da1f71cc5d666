import json
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.stream.streams import LINE, TOY, TOY_STATE

from sterna.stream import sections
from sterna.stream.description import VALUE_LIMIT, Descriptions, find_description, stream_description
from sterna.stream.vmstate import (
    DeviceState,
    StreamError,
    VmStateDescription,
    array,
    boolean,
    buffer,
    struct,
    timer,
    u16,
    u32,
    unused,
)
from sterna.stream.wire import StreamUnsupported

TEXT = stream_description([(TOY, TOY_STATE)], 4096)

NESTED = VmStateDescription("inner", 2, (u16("x"),), (VmStateDescription("inner/more", 1, (u16("y"),)),))
MANY = VmStateDescription(
    "many",
    4,
    (
        timer("expiry"),
        unused(3),
        boolean("on"),
        buffer("raw", 5),
        u32("cpsr", type_name="cpsr"),
        array(struct("lines", LINE), 4),
        unused(1),
        array(struct("odd", NESTED), 2),
    ),
)
MANY_STATE = DeviceState(
    "many",
    0,
    4,
    {
        "expiry": -1,
        "on": True,
        "raw": b"hello",
        "cpsr": 0x1D3,
        "lines": [{"level": i, "edge": True} for i in range(4)],
        "odd": [{"x": 1, "subsections": (DeviceState("inner/more", 0, 1, {"y": 2}),)}, {"x": 3}],
    },
)


def test_a_device_never_heard_of_is_read_by_its_description() -> None:
    found = Descriptions(TEXT)["toy", 1]
    assert found.decode(TOY.encode(TOY_STATE), name="toy", instance_id=1) == TOY_STATE
    assert Descriptions(TEXT).page_bytes == 4096
    assert list(Descriptions(TEXT)) == [("toy", 1)]


def test_all_kinds_of_fields_are_read_by_their_description() -> None:
    text = stream_description([(MANY, MANY_STATE)], 4096)
    names = [entry["name"] for entry in json.loads(text)["devices"][0]["fields"]]
    assert names == ["expiry", "unused", "on", "raw", "cpsr", "lines", "unused", "odd", "odd"]
    found = Descriptions(text)["many", 0]
    wire = MANY.encode(MANY_STATE)
    state = found.decode(wire)
    assert state.fields["odd[0]"] == MANY_STATE.fields["odd"][0]
    assert state.fields["odd[1]"] == MANY_STATE.fields["odd"][1]
    expected = {name: value for name, value in MANY_STATE.fields.items() if name != "odd"}
    assert {name: value for name, value in state.fields.items() if not name.startswith("odd")} == expected
    assert found.encode(state) == wire


def test_unknown_types_are_bytes_and_doubled_names_told_apart() -> None:
    fields = [
        {"name": "x", "type": "virtio", "size": 3},
        {"name": "x", "type": "uint16", "size": 2},
        {"name": "x", "type": "uint16", "size": 3},
        {"name": "subsections", "type": "int8 equal", "size": 1},
    ]
    device = {"name": "path/d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": fields}
    found = Descriptions(json.dumps({"page_size": 4096, "devices": [device]}).encode())["path/d", 0]
    state = found.decode(b"abc\1\2def\xff", name="path/d")
    assert state.fields == {"x": b"abc", "x'": 0x102, "x''": b"def", "subsections'": -1}
    assert state.name == "path/d"


def test_sections_of_unknown_version_are_raw() -> None:
    device = {
        "name": "slirp",
        "instance_id": 0,
        "size": 4,
        "fields": [{"name": "data", "size": 4, "type": "buffer"}],
    }
    found = Descriptions(json.dumps({"page_size": 4096, "devices": [device]}).encode())["slirp", 0]
    assert found.decode(b"abcd", version=4).fields == {"data": b"abcd"}


def test_a_device_that_is_not_described_is_named() -> None:
    with pytest.raises(StreamError, match="section 'disk': the stream does not describe instance 0"):
        Descriptions(TEXT)["disk", 0]


@pytest.mark.parametrize("before", [b"", b"\0", b"\x06" * 30, bytes(range(256)), b"\x06\0\0\0\2{"])
def test_the_description_is_found_at_the_end(before: bytes) -> None:
    assert find_description(before + sections.end_of_stream() + sections.vm_description(TEXT)) == TEXT
    assert find_description(before) is None


def device(**changes: Any) -> bytes:
    tree = {"name": "d", "instance_id": 0, "vmsd_name": "d", "version": 1, "fields": [], **changes}
    return json.dumps({"page_size": 4096, "devices": [tree]}).encode()


def structures(count: int, *fields: dict[str, Any]) -> list[dict[str, Any]]:
    """So many structures of one byte each."""
    byte = {"name": "b", "type": "uint8", "size": 1}
    inner = {"vmsd_name": "s", "version": 1, "fields": [byte, *fields]}
    return [{"name": "x", "array_len": count, "type": "struct", "size": 1, "struct": inner}]


def deep(depth: int) -> list[dict[str, Any]]:
    inner: list[dict[str, Any]] = [] if depth == 0 else deep(depth - 1)
    description = {"vmsd_name": "s", "version": 1, "fields": inner}
    return [{"name": "x", "type": "struct", "size": 1, "struct": description}]


@pytest.mark.parametrize(
    "fields",
    [
        [{"name": "x", "type": "uint8", "size": 1, "array_len": VALUE_LIMIT - 1}],
        structures(VALUE_LIMIT // 2),
        structures(VALUE_LIMIT // 32, *({"name": f"z{i}", "type": "buffer", "size": 0} for i in range(30))),
        structures(
            VALUE_LIMIT // 32, *({"name": "z", "type": "unused_buffer", "size": 0} for i in range(30))
        ),
        structures(VALUE_LIMIT // 33 + 1, *structures(15)),
    ],
)
def test_no_more_values_are_described_than_are_held(fields: list[dict[str, Any]]) -> None:
    """Few bytes of a stream, or none, become as much memory as a value takes."""
    with pytest.raises(StreamUnsupported, match=f"its devices have more than {VALUE_LIMIT} values"):
        Descriptions(device(fields=fields))
    with pytest.raises(StreamUnsupported, match="values"):
        Descriptions(device(subsections=[{"vmsd_name": "d/x", "version": 1, "fields": fields}]))
    fields[0]["array_len"] -= 2
    assert ("d", 0) in Descriptions(device(fields=fields))
    tree = json.loads(device(fields=fields))
    tree["devices"].append({**tree["devices"][0], "name": "e"})
    with pytest.raises(StreamUnsupported, match="values"):
        Descriptions(json.dumps(tree).encode())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "the description is not an object"),
        (b"{}", "'page_size' is not an integer"),
        (b'{"page_size": true, "devices": []}', "'page_size' is not an integer"),
        (b'{"page_size": 4096}', "'devices' is not a list"),
        (b'{"page_size": 4096, "devices": [1]}', "a device is not an object"),
        (device(name=3), "'name' is not a text"),
        (device(instance_id=-1), "'instance_id' is not an integer from 0"),
        (device(version="1"), "device 'd': 'version' is not an integer"),
        (device(fields={}), "device 'd': 'fields' is not a list"),
        (
            device(fields=[{"name": "x", "type": "buffer", "size": 2**63}]),
            "'size' is not an integer from 0 to",
        ),
        (device(fields=[{"name": "x", "type": "struct", "size": 1}]), "a structure is not an object"),
        (
            device(fields=[{"name": "x", "type": "uint8", "size": 1, "array_len": 2**40}]),
            "'array_len' is not an integer from 0 to",
        ),
        (
            device(fields=[{"name": "x", "type": "uint64", "size": 8, "array_len": 2**26}]),
            "field 'x' has 67108864 elements of 8 bytes",
        ),
        (
            device(
                fields=[
                    {
                        "name": "x",
                        "type": "struct",
                        "size": 1,
                        "array_len": 2**26,
                        "struct": {"vmsd_name": "e", "version": 1, "fields": []},
                    }
                ]
            ),
            "field 'x' has 67108864 elements of 1 bytes",
        ),
        (device(fields=deep(40)), "structures more than 16 deep"),
        (
            device(subsections=[{"vmsd_name": "e/x", "version": 1, "fields": []}]),
            "cannot be the name of a sub",
        ),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(text: bytes, message: str) -> None:
    with pytest.raises(StreamError, match=message) as caught:
        Descriptions(text)
    assert caught.value.section == "vmdesc"


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 70), st.sampled_from(["uint8", "struct", "buffer", "d"])
)
KEYS = st.sampled_from(
    ["name", "type", "size", "array_len", "index", "struct", "vmsd_name", "version", "fields"]
)
TREES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=9)
)


@pytest.mark.slow
@settings(max_examples=300)
@given(st.lists(TREES, max_size=4), st.binary(max_size=60))
def test_any_description_is_read_or_refused(fields: list[Any], body: bytes) -> None:
    try:
        found = Descriptions(device(fields=fields))["d", 0]
        state = found.decode(body)
    except StreamError as error:
        where = error.section
    else:
        where = state.name
    assert where in ("d", "vmdesc")


CHANGES = st.lists(
    st.tuples(st.integers(0, 1 << 12), st.integers(0, 3), st.binary(max_size=3)), min_size=1, max_size=3
)
"""Where, how many bytes are taken out there, and what is put in."""


@pytest.mark.slow
@settings(max_examples=300)
@given(CHANGES)
# The description's own name becomes `t`.
@example([(81, 3, b'"')])
def test_changed_descriptions_are_read_or_refused(changes: list[tuple[int, int, bytes]]) -> None:
    text = bytearray(stream_description([(TOY, TOY_STATE), (MANY, MANY_STATE)], 4096))
    for place, taken, put in changes:
        at = place % len(text)
        text[at : at + taken] = put
    wire = TOY.encode(TOY_STATE)
    try:
        # The name is the section's, as in a stream.
        state = Descriptions(bytes(text))["toy", 1].decode(wire, name="toy", instance_id=1)
    except StreamError as error:
        where = error.section
    else:
        where = state.name
    assert where in ("toy", "vmdesc")


def test_many_fields_of_one_name_take_no_longer_than_others() -> None:
    entry = {"name": "x", "type": "uint8", "size": 1}
    tree = {"name": "many", "instance_id": 0, "vmsd_name": "many", "version": 1, "fields": [entry] * 20_000}
    text = json.dumps({"page_size": 4096, "devices": [tree]}).encode()
    state = Descriptions(text)["many", 0].decode(bytes(20_000))
    assert len(state.fields) == 20_000
    assert list(state.fields)[:4] == ["x", "x'", "x''", "x'3"]
