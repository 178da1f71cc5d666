"""Kernel files: good ones, and every way to be bad."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.machine.images import EM_386, HEADER_BYTES, Elf

from sterna.boards.virt import BOARD as VIRT
from sterna.machine.loader import LoadError, Segment, place, read_image

CODE = VIRT.ram_base + 0x20_0000
MEMORY = 16 << 20
TREE = 0x2000
GOOD = Elf(CODE, ((CODE, b"code" * 4, 32), (CODE + 0x1000, b"data", 4)))


@pytest.fixture
def load(tmp_path):
    def load(content):
        path = tmp_path / "kernel.elf"
        path.write_bytes(content if isinstance(content, bytes) else content.build())
        return read_image(path, VIRT, MEMORY, TREE)

    return load


def test_segments(load):
    image = load(GOOD)
    assert image.entry == CODE
    assert image.segments == (Segment(CODE, b"code" * 4, 32), Segment(CODE + 0x1000, b"data", 4))


def test_place_writes_device_tree_and_segments(load):
    written = {}
    place(load(GOOD), b"tree", VIRT, written.__setitem__)
    assert written == {VIRT.ram_base: b"tree", CODE: b"code" * 4, CODE + 0x1000: b"data"}


def at(address, size=16):
    return Elf(address, ((address, b"x" * 16, size),))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an ELF file"),
        (b"#!/bin/sh\n", "not an ELF file"),
        (b"\x7fELF", "damaged"),
        (GOOD.build()[:HEADER_BYTES], "damaged|segment"),
        (GOOD.build()[:-3], "cut short"),
        (dataclasses.replace(GOOD, machine=EM_386), "EM_386"),
        (dataclasses.replace(GOOD, endianness=2), "big-endian"),
        (dataclasses.replace(GOOD, kind=3), "ET_DYN"),
        (b"\x7fELF\x02" + GOOD.build()[5:].ljust(4096, b"\0"), "64-bit"),
        (at(VIRT.ram_base - 8), "outside RAM"),
        (at(VIRT.ram_base + MEMORY - 8), "outside RAM"),
        (at(0x1000), "outside RAM"),
        (at(0xFFFF_FFF0, 0xFFFF_FFFF), "outside RAM"),
        (at(VIRT.ram_base), "device tree"),
        (at(VIRT.ram_base + TREE - 1), "device tree"),
        (at(CODE, 8), "more than in memory"),
        (dataclasses.replace(GOOD, entry=CODE - 4), "entry"),
        (dataclasses.replace(GOOD, segments=()), "entry"),
    ],
)
def test_files_that_cannot_be_loaded(load, content, message):
    with pytest.raises(LoadError, match=message) as caught:
        load(content)
    assert "kernel.elf" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_directly_behind_the_device_tree_is_fine(load):
    assert load(at(VIRT.ram_base + TREE)).entry == VIRT.ram_base + TREE


@pytest.mark.parametrize(("name", "message"), [("absent", "No such file"), (".", "not a regular file")])
def test_paths_that_are_no_file(tmp_path, name, message):
    with pytest.raises(LoadError, match=message):
        read_image(tmp_path / name, VIRT, MEMORY, TREE)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 115), st.integers(0, 255)), min_size=1, max_size=6), st.integers(0, 140)
)
def test_damaged_headers_never_write_outside_ram(tmp_path_factory, changes, cut):
    content = bytearray(GOOD.build())
    for offset, value in changes:
        content[offset] = value
    path = tmp_path_factory.getbasetemp() / "damaged.elf"
    path.write_bytes(content[: len(content) - cut] if cut < 40 else content)
    try:
        image = read_image(path, VIRT, MEMORY, TREE)
    except LoadError:
        return
    for segment in image.segments:
        assert VIRT.ram_base + TREE <= segment.ipa
        assert segment.ipa + max(segment.size, len(segment.data)) <= VIRT.ram_base + MEMORY
