"""What an incoming guest brings and its destination has not: judged and reported, or a refusal that says why."""

import json
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import pytest
from tests.migration.pairs import TCP, Host, hosts

from sterna.migration.destination import listen
from sterna.migration.destination.unmatched import RAM_LIMIT, SECTIONS_LIMIT
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.stream import sections
from sterna.stream.description import stream_description
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.vmstate import DeviceState, VmStateDescription, array, boolean, buffer, struct, u8, u32
from sterna.stream.wire import VMDESC_LIMIT
from sterna.testing.guest import CPU, DISK, DoubleGuest

PAGES = 3
FAILED, COMPLETED = MigrationStatus.FAILED, MigrationStatus.COMPLETED
ZERO, PAGE = 0x02, 0x08

LINE = VmStateDescription("nic/line", 1, (u8("level"), boolean("edge")))
NIC = VmStateDescription(
    "nic", 2, (u32("harmless"), array(struct("lines", LINE), 2), buffer("mac", 6), buffer("queue", 300))
)


def nic(harmless: int = 1) -> DeviceState:
    lines = [{"level": 1, "edge": True}, {"level": 0, "edge": False}]
    return DeviceState(
        "nic", 0, 2, {"harmless": harmless, "lines": lines, "mac": b"sterna", "queue": bytes(300)}
    )


@dataclass
class Guest:
    """A stream from a source with more in it than a double has.

    :ivar blocks: sizes and pages of its further RAM blocks
    """

    devices: list[tuple[VmStateDescription, DeviceState]] = field(default_factory=list)
    blocks: dict[str, tuple[int, dict[int, bytes]]] = field(default_factory=dict)
    description: bytes | None = None

    def stream(self) -> bytes:
        blocks = {"double.ram": (PAGES * 4096, {}), **self.blocks}
        setup = ram_setup([(name, size) for name, (size, _) in blocks.items()])
        out = sections.header(sections.Configuration("double-1.0", 12))
        out += sections.section_start(1, "ram", 0, 4) + setup + sections.footer(1)
        for name, (size, pages) in blocks.items():
            out += sections.section_part(1)
            for page in range(size >> 12):
                out += ((page << 12) | (PAGE if page in pages else ZERO)).to_bytes(8, "big")
                out += bytes((len(name),)) + name.encode() + pages.get(page, b"\0")
            out += END_OF_RECORDS + sections.footer(1)
        out += sections.section_end(1) + END_OF_RECORDS + sections.footer(1)
        cpu = DeviceState("cpu", 0, 1, {"steps": 0, "counter": 0, "running": 1})
        disk = DeviceState("disk", 0, 3, {"cache": list(range(24))})
        devices = [(CPU, cpu), *self.devices, (DISK, disk)]
        for number, (description, state) in enumerate(devices, 2):
            out += sections.device_section(number, description, state)
        text = stream_description(devices, 4096) if self.description is None else self.description
        return out + sections.end_of_stream() + (sections.vm_description(text) if text else b"")


def feed(there: Host, data: bytes, path: Path) -> MigrationInfo:
    path.write_bytes(data)
    there.controller.incoming(f"file:{path}")
    return there.outcome()


def take_in(guest: Guest, path: Path, ignored: str = "") -> MigrationInfo:
    """The outcome of a stream, which is either a guest that runs or a refusal that leaves nothing behind."""
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        there.controller.set_parameters({"x-sterna-ignore-sections": ignored})
        info = feed(there, guest.stream(), path / "stream")
        assert there.guest.running is (info.status is COMPLETED)
        if info.status is FAILED:
            assert not info.left_behind
            assert not there.guest.block.data.any()
        return info


def test_a_harmless_device_is_left_behind_and_reported(tmp_path: Path) -> None:
    info = take_in(Guest([(NIC, nic())]), tmp_path)
    assert info.status is COMPLETED, info.error
    [left] = info.left_behind
    assert (left.kind, left.name, left.instance_id, left.ignored) == ("section", "nic", 0, False)
    assert (left.nbytes, left.reason) == (4 + 4 + 6 + 300, "it says so")
    assert left.fields == {
        "harmless": 1,
        "lines": [{"level": 1, "edge": True}, {"level": 0, "edge": False}],
        "mac": b"sterna".hex(),
        "queue": "300 bytes",
    }
    [shown] = json.loads(json.dumps(info.to_qmp()))["x-sterna"]["left-behind"]
    assert (shown["name"], shown["instance-id"], shown["fields"]["mac"]) == ("nic", 0, b"sterna".hex())


def test_a_device_that_matters_is_a_refusal(tmp_path: Path) -> None:
    info = take_in(Guest([(NIC, nic(harmless=0))]), tmp_path)
    assert info.status is FAILED
    assert "section 'nic': Unknown savevm section or instance 'nic' 0" in info.error
    assert "field 'harmless' is not 1" in info.error
    assert "x-sterna-ignore-sections" in info.error
    info = take_in(Guest([(NIC, nic(harmless=0))]), tmp_path, ignored="tape, nic")
    assert info.status is COMPLETED, info.error
    [left] = info.left_behind
    assert (left.ignored, left.fields["harmless"]) == (True, 0)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"page_size": 4096, "devices": []}'])
def test_a_device_that_is_not_described_is_a_refusal(text: bytes, tmp_path: Path) -> None:
    guest = Guest([(NIC, nic())], description=text)
    info = take_in(guest, tmp_path)
    assert info.status is FAILED
    assert "describe" in info.error or "'vmdesc'" in info.error or "begins with" in info.error
    assert take_in(guest, tmp_path, ignored="nic").status is COMPLETED
    assert take_in(Guest(description=text), tmp_path).status is COMPLETED, "nobody needs a description"


def test_a_description_that_contradicts_its_section(tmp_path: Path) -> None:
    good = json.loads(stream_description([(NIC, nic())], 4096))
    for change, text in (
        (lambda fields: fields.pop(), "section 'nic', offset .*: 300 bytes after the last field"),
        (lambda fields: fields.append({"name": "more", "type": "uint32", "size": 4}), "cut short"),
        (lambda fields: fields[1].update(array_len=200), "cut short"),
        (lambda fields: fields[1].update(array_len=1 << 40), "'array_len'"),
        (lambda fields: fields[0].update(size=1 << 40), "'size'"),
    ):
        tree = json.loads(json.dumps(good))
        change(tree["devices"][0]["fields"])
        info = take_in(Guest([(NIC, nic())], description=json.dumps(tree).encode()), tmp_path)
        assert info.status is FAILED
        assert re.search(text, info.error), info.error


def test_lengths_are_capped(tmp_path: Path) -> None:
    big = VmStateDescription("big", 1, (u32("harmless"), buffer("x", SECTIONS_LIMIT // 2)))
    states = [DeviceState("big", i, 1, {"harmless": 1, "x": bytes(SECTIONS_LIMIT // 2)}) for i in range(2)]
    info = take_in(Guest([(big, states[0])]), tmp_path)
    assert info.status is COMPLETED, info.error
    info = take_in(Guest([(big, state) for state in states]), tmp_path)
    assert "'big (instance 1)', offset" in info.error
    assert f"more than {SECTIONS_LIMIT} bytes" in info.error
    stream = Guest([(NIC, nic())], description=b"{").stream()
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        at = stream.rindex(b"\0\0\0\1{")
        info = feed(there, stream[:at] + (1 << 30).to_bytes(4, "big") + b"{", tmp_path / "s")
        assert info.status is FAILED
        assert f"a description of 1073741824 bytes, the limit is {VMDESC_LIMIT}" in info.error


def test_flash_is_left_behind_while_it_is_blank(tmp_path: Path) -> None:
    def flash(pages: dict[int, bytes]) -> Guest:
        return Guest(blocks={"double.flash": (64 << 10, pages), "double.rom": (4096, {0: b"rom!" * 1024})})

    for pages in ({}, {3: b"\xff" * 4096}):
        info = take_in(flash(pages), tmp_path)
        assert info.status is COMPLETED, info.error
        assert [(left.kind, left.name, left.nbytes) for left in info.left_behind] == [
            ("ram", "double.flash", 64 << 10),
            ("ram", "double.rom", 4096),
        ]
    assert info.left_behind[0].digest != take_in(flash({}), tmp_path).left_behind[0].digest
    for page in (b"\0" * 4095 + b"\1", b"\xff" * 4095 + b"\0", b"\x55" * 4096):
        info = take_in(flash({2: b"\xff" * 4096, 5: page}), tmp_path)
        assert (
            "RAM block 'double.flash' is not here, and the guest would miss what it holds at 0x5000"
            in info.error
        )
    info = take_in(flash({5: b"\x55" * 4096}), tmp_path, ignored="double.flash")
    assert info.status is COMPLETED
    assert [left.ignored for left in info.left_behind] == [True, False]


def test_a_flash_that_is_in_use_is_refused_before_the_source_stops_its_guest(tmp_path: Path) -> None:
    stream = Guest(blocks={"double.flash": (4096, {0: b"\x55" * 4096})}).stream()
    end_of_page = stream.index(b"\x55" * 4096) + 4096 + 8
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, stream[:end_of_page], tmp_path / "s")
        assert "the guest would miss" in info.error


def test_ram_that_nobody_knows_is_refused_at_once(tmp_path: Path) -> None:
    info = take_in(Guest(blocks={"pc.ram": (4096, {})}), tmp_path)
    assert 'Unknown ramblock "pc.ram", cannot accept migration' in info.error
    assert take_in(Guest(blocks={"pc.ram": (4096, {})}), tmp_path, ignored="pc.ram").status is COMPLETED
    setup = ram_setup([("double.ram", PAGES * 4096), ("double.rom", RAM_LIMIT), ("double.flash", 4096)])
    stream = sections.header(sections.Configuration("double-1.0", 12)) + sections.section_start(
        1, "ram", 0, 4
    )
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, stream + setup + sections.footer(1), tmp_path / "s")
        assert 'Unknown ramblock "double.flash"' in info.error


def test_ram_that_is_left_behind_must_be_complete(tmp_path: Path) -> None:
    stream = Guest(blocks={"double.rom": (8192, {})}).stream()
    record = (4096 | ZERO).to_bytes(8, "big") + b"\x0adouble.rom\0"
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, stream.replace(record, b""), tmp_path / "s")
        assert "RAM block 'double.rom': page at 0x1000 never came" in info.error


def test_a_sterna_has_the_same_devices() -> None:
    """What a sterna sends and its destination has not is no device of QEMU's."""
    with hosts(DoubleGuest(PAGES), DoubleGuest(PAGES, running=False)) as (here, there):
        here.guest.descriptions["nic"] = NIC
        save = here.guest.save_devices
        here.guest.save_devices = lambda: [*save(), nic()]  # type: ignore[method-assign]
        info = here.migrate(there.controller.incoming(TCP))
        assert info.error.endswith("this machine has no such device")
        assert here.guest.running


@pytest.mark.parametrize("seed", range(4))
def test_damage_anywhere_is_a_refusal_or_harmless(seed: int, tmp_path: Path) -> None:
    """Flipped bytes in unknown sections and in the description: never a crash, never a guest that runs half."""
    random = Random(seed)
    good = Guest([(NIC, nic())]).stream()
    start = good.index(b"\x03nic") - 5
    refused = number = 0
    while number < 60:
        with hosts(DoubleGuest(PAGES, running=False)) as (there,):
            while number < 60 and there.controller.info().status is not COMPLETED:
                data = bytearray(good)
                for _ in range(random.randint(1, 3)):
                    data[random.randrange(start, len(data))] = random.randrange(256)
                if random.random() < 0.2:
                    del data[random.randrange(start, len(data)) :]
                info = feed(there, bytes(data), tmp_path / f"s{number}")
                number += 1
                assert there.guest.running is (info.status is COMPLETED)
                if info.status is FAILED:
                    refused += 1
                    assert "\n" not in info.error
                    assert not info.error.split(":")[0].endswith("Error"), info.error
    assert refused > 10


def test_a_source_that_falls_silent_before_its_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listen, "SILENCE_SECONDS", 0.3)
    stream = Guest([(NIC, nic())]).stream()
    end = stream.rindex(b"\0\x06", 0, stream.index(b'{"page_size"'))
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        address = there.controller.incoming(TCP)
        host, _, port = address.removeprefix("tcp:").rpartition(":")
        with socket.create_connection((host, int(port))) as source:
            source.sendall(stream[: end + 1])
            there.wait_status(FAILED)
        assert re.search(r"sent only \d+ bytes in 0\.3 s", there.controller.info().error)
