import pytest

from sterna.stream import sections
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import StreamError
from sterna.stream.wire import Command

# The first bytes that `qemu-system-arm -M virt` 7.2 writes, up to its first section.
VIRT = bytes.fromhex(
    "5145564d00000003"
    "07 00000008 766972742d372e32"
    "05 1e 636f6e66696775726174696f6e2f7461726765742d706167652d62697473 00000001 0000000c"
)


def test_header_is_that_of_virt() -> None:
    assert sections.header(Configuration("virt-7.2")) == VIRT


def test_header_without_page_bits_is_that_of_vexpress() -> None:
    expected = bytes.fromhex("5145564d0000000307 0000000c") + b"vexpress-a15"
    assert sections.header(Configuration("vexpress-a15", page_bits=None)) == expected


def test_sections() -> None:
    assert sections.section_start(2, "ram", 0, 4).hex() == "0100000002" + "0372616d" + "00000000" + "00000004"
    assert sections.section_full(9, "cpu", 1, 22).hex() == "0400000009" + "03637075" + "00000001" + "00000016"
    assert sections.section_part(2).hex() == "0200000002"
    assert sections.section_end(2).hex() == "0300000002"
    assert sections.footer(2).hex() == "7e00000002"
    assert sections.command(Command.PING, b"\0\0\0\1").hex() == "080002000400000001"
    assert sections.end_of_stream() == b"\0"
    assert sections.vm_description(b"{}").hex() == "0600000002" + "7b7d"


def test_what_does_not_fit_is_refused() -> None:
    for name in ("", "x" * 256, "é" * 128):
        with pytest.raises(StreamError, match="a section's name has 1 to 255 bytes"):
            sections.section_full(1, name, 0, 1)
    with pytest.raises(StreamError, match="65536 bytes is too long"):
        sections.command(Command.PACKAGED, bytes(65536))
    with pytest.raises(StreamError, match="uuid"):
        sections.header(Configuration("virt-7.2", uuid=bytes(15)))
    with pytest.raises(StreamError, match="counts 4097 elements"):
        sections.header(Configuration("x" * 4097))


def test_configuration_comes_back() -> None:
    full = Configuration("virt-7.2", 12, bytes(range(16)), ("x-ignore-shared", "mapped-ram"))
    for configuration in (full, Configuration("é", None)):
        assert Configuration.from_state(configuration.state()) == configuration
        body = sections.CONFIGURATION.encode(configuration.state())
        assert Configuration.from_state(sections.CONFIGURATION.decode(body)) == configuration
