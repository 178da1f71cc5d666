"""Streams that a real QEMU writes, read here; and streams written here that a real QEMU reads."""

import json
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.savedstream import saved, saving

from sterna.memory.ram import RamBlock
from sterna.stream import sections
from sterna.stream.description import Descriptions, find_description, stream_description
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.encoder import encode_pages
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup, read_setup
from sterna.stream.reader import EndOfStream, SectionHeader, SectionPiece, StreamReader, VmDescription
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import (
    DeviceState,
    VmStateDescription,
    array,
    i32,
    struct,
    u32,
    u64,
)
from sterna.stream.wire import LEGACY_ARM_PAGE_BITS, SectionType

pytestmark = pytest.mark.qemu

RAM_BYTES = 16 << 20
SECONDS = 300

PL011 = VmStateDescription(
    "pl011",
    2,
    (
        *(
            u32(name)
            for name in ["readbuff", "flags", "lcr", "rsr", "cr", "dmacr", "int_enabled", "int_level"]
        ),
        array(u32("read_fifo"), 16),
        *(u32(name) for name in ["ilpr", "ibrd", "fbrd", "ifl"]),
        *(i32(name) for name in ["read_pos", "read_count", "read_trigger"]),
    ),
    (
        VmStateDescription(
            "pl011/clock", 1, (struct("clk", VmStateDescription("clock", 0, (u64("period"),))),)
        ),
    ),
)


class Qemu:
    """A running QEMU and its QMP connection."""

    def __init__(self, command: list[str], path: Path) -> None:
        self.process = subprocess.Popen(
            [*command, "-qmp", f"unix:{path},server=on,wait=off"], stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + SECONDS
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        while self._socket.connect_ex(str(path)):
            assert time.monotonic() < deadline, "QEMU does not listen"
            assert self.process.poll() is None, "QEMU has ended"
        self._file = self._socket.makefile("rw")
        assert "QMP" in json.loads(self._file.readline())
        self("qmp_capabilities")

    def __call__(self, command: str, **arguments: Any) -> Any:
        self._file.write(json.dumps({"execute": command, "arguments": arguments}))
        self._file.flush()
        while "event" in (answer := json.loads(self._file.readline())):
            pass
        assert "return" in answer, answer
        return answer["return"]

    def until(self, command: str, key: str, *expected: str) -> str:
        deadline = time.monotonic() + SECONDS
        while (found := str(self(command).get(key))) not in expected:
            assert time.monotonic() < deadline, f"{command}: {key} stays {found}"
        return found

    def close(self) -> None:
        self._file.close()
        self._socket.close()
        self.process.kill()
        self.process.wait(SECONDS)


@contextmanager
def running(command: list[str], path: Path) -> Iterator[Qemu]:
    guest = Qemu(command, path)
    try:
        yield guest
    finally:
        guest.close()


@dataclass(frozen=True)
class Board:
    machine: str
    ram_base: int
    ram_name: str

    def command(self, qemu: str) -> list[str]:
        options = f"-M {self.machine} -cpu cortex-a15 -m {RAM_BYTES >> 20} -S -nodefaults -display none"
        return [qemu, *options.split()]


BOARDS = [
    Board("virt", 0x40000000, "mach-virt.ram"),
    Board("vexpress-a15", 0x80000000, "vexpress.highmem"),
]


@dataclass(frozen=True)
class Recording:
    """A stream that QEMU wrote, and its guest's RAM at that time."""

    board: Board
    stream: bytes
    ram: bytes


@pytest.fixture(scope="module", params=BOARDS, ids=lambda board: board.machine)
def recording(request: Any, qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    board: Board = request.param
    folder = tmp_path_factory.mktemp("recording")
    content = np.random.default_rng(11).integers(0, 256, 3 << 20, dtype=np.uint8)
    content[1 << 20 : 2 << 20] = 0
    (folder / "content").write_bytes(content.tobytes())
    loader = f"loader,file={folder / 'content'},addr={board.ram_base + 0x400400:#x},force-raw=on"
    with running([*board.command(qemu), "-device", loader], folder / "qmp") as guest:
        guest("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        guest("migrate", uri=saving(folder / "stream"))
        assert guest.until("query-migrate", "status", "completed", "failed") == "completed"
        guest("pmemsave", val=board.ram_base, size=RAM_BYTES, filename=str(folder / "ram"))
    return Recording(board, saved(folder / "stream"), (folder / "ram").read_bytes())


@dataclass
class Loaded:
    """All that a stream carries."""

    configuration: Configuration
    ram_header: SectionHeader
    blocks: list[RamBlock]
    devices: list[tuple[SectionHeader, VmStateDescription, DeviceState]]
    text: bytes
    again: bytes


class BytesInPieces:
    def __init__(self, data: bytes, step: int) -> None:
        self._data = memoryview(data)
        self._step = step

    def readinto(self, buffer: memoryview) -> int:
        piece = self._data[: min(self._step, len(buffer))]
        buffer[: len(piece)] = piece
        self._data = self._data[len(piece) :]
        return len(piece)


def load(stream: bytes, step: int = 1 << 20) -> Loaded:
    """Read a stream, and write it again from what was read (page records are copied, not made)."""
    text = find_description(stream)
    assert text is not None
    descriptions = Descriptions(text)
    reader = StreamReader(BytesInPieces(stream, step))
    configuration = reader.next()
    assert isinstance(configuration, Configuration)
    found = Loaded(configuration, SectionHeader(0, "", 0, 0), [], [], text, sections.header(configuration))
    page_bits = configuration.page_bits or LEGACY_ARM_PAGE_BITS
    assert descriptions.page_bytes == 1 << page_bits
    decoder = RamDecoder([])
    while (event := reader.next()) is not None:
        at = reader.offset
        match event:
            case SectionPiece(SectionType.START, header):
                assert (header.name, header.version) == ("ram", 4)
                found.ram_header = header
                blocks = read_setup(reader, page_bits)
                found.blocks += [RamBlock(name, size) for name, size in blocks]
                decoder = RamDecoder(found.blocks, page_bits)
                number = header.section_id
                found.again += sections.section_start(number, header.name, header.instance_id, header.version)
                found.again += ram_setup(blocks) + sections.footer(number)
            case SectionPiece(SectionType.PART | SectionType.END as kind, header):
                decoder.read_records(reader)
                opening = sections.section_part if kind == SectionType.PART else sections.section_end
                found.again += opening(header.section_id) + stream[at : reader.offset]
                found.again += sections.footer(header.section_id)
            case SectionPiece(_, header):
                description = descriptions[header.name, header.instance_id]
                state = reader.read_state(description)
                found.devices.append((header, description, state))
                found.again += sections.device_section(header.section_id, description, state)
            case EndOfStream():
                found.again += sections.end_of_stream()
            case VmDescription(text):
                found.again += sections.vm_description(text)
            case _:
                pytest.fail(f"unexpected {event}")
    statistics = decoder.statistics()
    assert statistics.records >= sum(block.size >> page_bits for block in found.blocks)
    assert statistics.normal >= (2 << 20) >> page_bits
    return found


@pytest.mark.parametrize("step", [1 << 20, 1000])
def test_a_stream_is_read_and_written_again_byte_for_byte(recording: Recording, step: int) -> None:
    found = load(recording.stream, step)
    assert found.again == recording.stream


def test_ram_is_what_the_guest_had(recording: Recording) -> None:
    found = load(recording.stream)
    (ram,) = (block for block in found.blocks if block.name == recording.board.ram_name)
    assert ram.data.tobytes() == recording.ram


def test_descriptions_are_laid_out_as_qemus(recording: Recording) -> None:
    found = load(recording.stream)
    theirs = json.loads(found.text)["devices"]
    ours = [description.vmdesc(state) for _, description, state in found.devices]
    assert [json.dumps(device) for device in ours] == [json.dumps(device) for device in theirs]


def test_a_description_of_ones_own_agrees_with_qemus(recording: Recording) -> None:
    found = load(recording.stream)
    theirs = {device["name"]: device for device in reversed(json.loads(found.text)["devices"])}
    (state, description) = next(
        (state, part) for header, part, state in found.devices if header.name == "pl011"
    )
    assert PL011.decode(description.encode(state)) == state
    assert json.dumps(PL011.vmdesc(state)) == json.dumps(theirs["pl011"])


def test_qemu_reads_what_is_written_here(recording: Recording, qemu: str, tmp_path: Path) -> None:
    """Everything is made anew: page records, sections in order, description. The guest's RAM arrives."""
    found = load(recording.stream)
    page_bits = found.configuration.page_bits or LEGACY_ARM_PAGE_BITS
    number = found.ram_header.section_id
    parts = [sections.header(found.configuration), sections.section_start(number, "ram", 0, 4)]
    parts += [ram_setup([(block.name, block.size) for block in found.blocks]), sections.footer(number)]
    closing = END_OF_RECORDS + sections.footer(number)
    for block in found.blocks:
        pages = encode_pages(
            block,
            np.arange(block.pages),
            prefix=sections.section_part(number),
            suffix=closing,
            page_bits=page_bits,
        )
        parts.append(pages.tobytes())
    parts.append(sections.section_end(number) + closing)
    for header, description, state in found.devices:
        parts.append(sections.device_section(header.section_id, description, state))
    described = [(description, state) for _, description, state in found.devices]
    parts.append(sections.end_of_stream())
    parts.append(sections.vm_description(stream_description(described, 1 << page_bits)))
    (tmp_path / "stream").write_bytes(b"".join(parts))
    command = [*recording.board.command(qemu), "-incoming", "defer"]
    with running(command, tmp_path / "qmp") as guest:
        guest("migrate-incoming", uri=f"exec:cat {tmp_path / 'stream'}")
        assert guest.until("query-migrate", "status", "completed", "failed") == "completed"
        guest("pmemsave", val=recording.board.ram_base, size=RAM_BYTES, filename=str(tmp_path / "ram"))
    assert (tmp_path / "ram").read_bytes() == recording.ram


def test_configuration_with_all_subsections(qemu: str, tmp_path: Path) -> None:
    """UUID and capabilities, which QEMU sends only when they are asked for."""
    command = [*BOARDS[0].command(qemu), "-uuid", "00112233-4455-6677-8899-aabbccddeeff"]
    with running(command, tmp_path / "qmp") as guest:
        wanted = [{"capability": name, "state": True} for name in ("validate-uuid", "x-ignore-shared")]
        guest("migrate-set-capabilities", capabilities=wanted)
        guest("migrate", uri=saving(tmp_path / "stream"))
        assert guest.until("query-migrate", "status", "completed", "failed") == "completed"
    stream = saved(tmp_path / "stream")
    configuration = StreamReader(BytesInPieces(stream, 100)).next()
    uuid = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert isinstance(configuration, Configuration)
    assert configuration == Configuration(configuration.machine, 12, uuid, ("x-ignore-shared",))
    assert configuration.machine.startswith("virt-")
    assert stream.startswith(sections.header(configuration))
