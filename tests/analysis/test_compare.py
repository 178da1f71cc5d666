"""What differs between two streams."""

from dataclasses import replace

import numpy as np
import pytest
from tests.stream.streams import TOY, TOY_STATE, PieceSource

from sterna.analysis import compare as comparing
from sterna.analysis.compare import BlockDifference, FieldDifference, StreamDifference, compare
from sterna.analysis.findings import StreamSurvey
from sterna.analysis.survey import survey
from sterna.memory.ram import RamBlock
from sterna.stream import sections
from sterna.stream.description import find_description, stream_description
from sterna.stream.ram.encoder import encode_pages
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import DeviceState, VmStateDescription, buffer

DISK = VmStateDescription("disk", 1, (buffer("cache", 100),))
DISK_STATE = DeviceState("disk", 0, 1, {"cache": bytes(100)})
TOY_CONFIGURATION = Configuration("toy-1.0")


def stream_of(
    blocks: list[RamBlock],
    toy: DeviceState = TOY_STATE,
    disk: DeviceState | None = DISK_STATE,
    configuration: Configuration = TOY_CONFIGURATION,
    described: bool = True,
    twice: bool = False,
) -> StreamSurvey:
    bits = configuration.page_bits or 10
    closing = END_OF_RECORDS + sections.footer(2)
    out = sections.header(configuration) + sections.section_start(2, "ram", 0, 4)
    out += ram_setup([(block.name, block.size) for block in blocks]) + sections.footer(2)
    for block in blocks * (2 if twice else 1):
        pages = np.arange(block.pages)
        opening = sections.section_part(2)
        out += encode_pages(block, pages, prefix=opening, suffix=closing, page_bits=bits).tobytes()
    out += sections.section_end(2) + closing
    devices = [(TOY, toy), *([(DISK, disk)] if disk else [])]
    for number, (description, state) in enumerate(devices, 3):
        out += sections.device_section(number, description, state)
    out += sections.end_of_stream()
    if described:
        out += sections.vm_description(stream_description(devices, 1 << bits))
    found = survey(PieceSource(out), description=find_description(out), page_digests=True)
    assert found.flaw() is None, found.flaw()
    return found


def test_equal_streams(block: RamBlock) -> None:
    nothing = StreamDifference((), (), 0)
    assert nothing.equal
    assert compare(stream_of([block]), stream_of([block])) == nothing
    # The way there does not count, and without a description bodies are compared.
    assert compare(stream_of([block]), stream_of([block], twice=True)) == nothing
    assert compare(stream_of([block]), stream_of([block], described=False)) == nothing


def test_pages_that_differ(block: RamBlock) -> None:
    before = stream_of([block])
    for page in (0, 2, 3, 7):
        block.data[page * 4096 + 5] ^= 1
    difference = compare(before, stream_of([block]))
    assert difference.blocks == (BlockDifference("toy.ram", 4, ((0, 0), (2, 3), (7, 7))),)
    assert not difference.equal
    assert difference.fields == ()


def test_the_last_version_of_a_page_counts(block: RamBlock) -> None:
    """A page sent once with old content and once with new equals the page sent only as new, zero or not."""
    new = stream_of([block])
    out = sections.header(Configuration("toy-1.0")) + sections.section_start(2, "ram", 0, 4)
    out += ram_setup([(block.name, block.size)]) + sections.footer(2)
    for change in (0xFF, 0xFF):
        block.data[:] ^= change
        out += encode_pages(
            block,
            np.arange(block.pages),
            prefix=sections.section_part(2),
            suffix=END_OF_RECORDS + sections.footer(2),
        ).tobytes()
    out += sections.section_end(2) + END_OF_RECORDS + sections.footer(2) + sections.end_of_stream()
    found = survey(PieceSource(out), page_digests=True)
    assert found.fault is None
    assert compare(new, found).blocks == ()


def test_blocks_that_differ(block: RamBlock) -> None:
    with RamBlock("rom", 4096) as rom, RamBlock("toy.ram", 4096) as small:
        assert compare(stream_of([block]), stream_of([block, rom])).blocks == (
            BlockDifference("rom", 1, ((0, 0),), "only in the second stream"),
        )
        [difference] = compare(stream_of([block]), stream_of([small])).blocks
        assert difference.note == "32768 and 4096 bytes, in pages of 4096 and 4096"
        assert not StreamDifference((difference,), (), 0).equal
        halved = compare(stream_of([block]), stream_of([block], configuration=Configuration("toy-1.0", 10)))
        assert "in pages of 4096 and 1024" in halved.blocks[0].note
        assert halved.fields == (FieldDifference("configuration", "page_bits", "12", "10"),)


def test_fields_that_differ(block: RamBlock) -> None:
    toy = replace(
        TOY_STATE,
        fields={
            **TOY_STATE.fields,
            "lines": [{"level": 0, "edge": False}, {"level": 9, "edge": True}, {"level": 2, "edge": False}],
            "count": 3,
            "queue": [5, 6, 7],
        },
        subsections=(DeviceState("toy/extra", 0, 1, {"clock": 1}),),
    )
    disk = replace(DISK_STATE, fields={"cache": bytes(10) + b"abc" + bytes(87)})
    other = stream_of([block], toy, disk, Configuration("toy-2.0", uuid=bytes(16)))
    name = "toy (instance 1)"
    assert compare(stream_of([block]), other).fields == (
        FieldDifference("configuration", "machine", "toy-1.0", "toy-2.0"),
        FieldDifference("configuration", "uuid", "None", "00" * 16),
        FieldDifference(name, "lines[1].level", "1", "9"),
        FieldDifference(name, "count", "2", "3"),
        FieldDifference(name, "queue[1]", str(2**64 - 1), "6"),
        FieldDifference(name, "queue[2]", None, "7"),
        FieldDifference(name, "<toy/extra>.clock", "16000", "1"),
        FieldDifference("disk", "cache[10:13]", "000000", "616263"),
    )


def test_devices_and_subsections_that_are_missing(block: RamBlock) -> None:
    other = stream_of([block], replace(TOY_STATE, subsections=()), disk=None)
    assert compare(stream_of([block]), other).fields == (
        FieldDifference("toy (instance 1)", "<toy/extra>", "2 values", None),
        FieldDifference("disk", "", "100 bytes", None),
    )


def test_bodies_that_nobody_describes(block: RamBlock) -> None:
    disk = replace(DISK_STATE, fields={"cache": b"x" * 100})
    [difference] = compare(stream_of([block], described=False), stream_of([block], disk=disk)).fields
    assert (difference.section, difference.field) == ("disk", "")
    assert difference.left != difference.right


def test_long_lists_are_cut_but_counted(block: RamBlock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "FIELD_LIMIT", 1)
    monkeypatch.setattr(comparing, "RANGE_LIMIT", 2)
    before = stream_of([block])
    block.data[:: 2 * 4096] ^= 1
    toy = replace(TOY_STATE, fields={**TOY_STATE.fields, "control": 1, "queue": [1, 1]})
    difference = compare(before, stream_of([block], toy))
    assert difference.blocks == (BlockDifference("toy.ram", 4, ((0, 0), (2, 2))),)
    assert (len(difference.fields), difference.field_count) == (1, 3)
