"""A destination fed with anything but a good stream: it says what is wrong and where, and never starts a
guest.
"""

import random
import socket
from pathlib import Path

import pytest
from tests.migration.pairs import TCP, Host, hosts
from tests.migration.proxy import Fault, Proxy

from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.stream import sections
from sterna.stream.ram.setup import ram_setup
from sterna.testing.guest import DoubleGuest

PAGES = 3
FAILED, COMPLETED = MigrationStatus.FAILED, MigrationStatus.COMPLETED


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A whole stream with digests."""
    path = tmp_path_factory.mktemp("stream") / "stream"
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    guest.advance_steps(1)
    with hosts(guest) as (here,):
        here.controller.set_parameters({"x-sterna-verify": "on"})
        assert here.migrate(f"file:{path}").status is COMPLETED
    return path.read_bytes()


def feed(there: Host, data: bytes, path: Path) -> MigrationInfo:
    """Let a destination read a stream from a file."""
    path.write_bytes(data)
    there.controller.incoming(f"file:{path}")
    return there.outcome()


def assert_refused(there: Host, info: MigrationInfo, what: object) -> None:
    assert info.status is FAILED, (what, info)
    assert info.error, what
    assert "\n" not in info.error
    assert len(info.error) < 600
    assert not there.guest.running, what
    assert not there.guest.block.data.any(), what


def end_of(stream: bytes) -> int:
    """Where the description begins: behind the byte that ends the stream."""
    return stream.index(b'{"page_size"') - 5


def positions(stream: bytes, size: int) -> list[int]:
    """Every byte before `size`, but of those within the data of the one page that is sent only some."""
    page = range(200, 4200)
    assert set(stream[page.start : page.stop]) == {0}
    return [at for at in range(size) if at not in page or at % 53 == 0]


def test_the_stream_itself_is_good(stream: bytes, tmp_path: Path) -> None:
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, stream, tmp_path / "s")
        assert (info.status, info.verified) == (COMPLETED, True), info.error
        there.guest.check_ram()


@pytest.mark.slow
def test_cut_anywhere(stream: bytes, tmp_path: Path) -> None:
    end = end_of(stream)
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        for at in positions(stream, len(stream)):
            if at == end:
                continue  # complete, only without its description
            info = feed(there, stream[:at], tmp_path / "s")
            assert_refused(there, info, at)
            assert f"offset {at:#x}" in info.error, (at, info.error)


@pytest.mark.slow
def test_flipped_anywhere(stream: bytes, tmp_path: Path) -> None:
    end = end_of(stream)
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        for at in positions(stream, end):
            damaged = bytearray(stream)
            damaged[at] ^= 1 << at % 8
            info = feed(there, bytes(damaged), tmp_path / "s")
            assert_refused(there, info, at)


@pytest.mark.slow
def test_flips_on_a_live_connection_leave_the_guest_with_one_owner() -> None:
    """Within the handshake, RAM, devices and the last messages; every damaged byte is noticed by one of the
    two.
    """
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        port = int(there.controller.incoming(TCP).rpartition(":")[2])
        guest = DoubleGuest(PAGES, steps_per_ms=0)
        guest.advance_steps(1)
        with hosts(guest) as (here,):
            # A damaged length makes the destination wait for bytes that never come.
            here.controller.set_parameters({"x-sterna-switchover-timeout": 200})
            # From behind the greeting, which a damaged value would leave unanswered, to the end of the
            # devices.
            for at in (*range(78, 260), *range(4300, 4500)):
                with Proxy(port, Fault(flip=at)) as proxy:
                    info = here.migrate(proxy.uri)
                there.controller.wait(300)
                assert info.status is FAILED, at
                assert guest.running, at
                assert not there.guest.running, at


@pytest.mark.slow
def test_flips_on_the_way_back_leave_the_guest_with_one_owner() -> None:
    moved = at = 0
    total = 1
    while at < total:
        guest = DoubleGuest(PAGES, steps_per_ms=0)
        guest.advance_steps(1)
        with hosts(guest, DoubleGuest(PAGES, running=False)) as (here, there):
            port = int(there.controller.incoming(TCP).rpartition(":")[2])
            # The first round is without a fault, to learn how much comes back.
            fault = Fault() if total == 1 else Fault(flip_back=at)
            with Proxy(port, fault) as proxy:
                here.controller.migrate(proxy.uri)
                while (info := here.controller.wait(0.2)).status.running:
                    # A damaged length makes the source wait for bytes that never come; after a pass it has patience of its own.
                    if total > 1 and proxy.forwarded[1] > at and info.status is not MigrationStatus.ACTIVE:
                        here.expire()
            there.controller.wait(300)
            assert guest.running == (info.status is FAILED), (at, info)
            assert there.guest.running == (info.status is COMPLETED), (at, info)
        if fault.flip_back is None:
            total = proxy.forwarded[1]
            continue
        moved += info.status is COMPLETED
        at += 1
    assert moved > 20, "a damaged RUNNING makes the source ask"
    assert at - moved > 100


def test_random_bytes(tmp_path: Path) -> None:
    rng = random.Random(7)
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        for size in (1, 3, 8, 100, 10_000):
            assert_refused(there, feed(there, rng.randbytes(size), tmp_path / "s"), size)
        for _ in range(200):
            head = sections.header(sections.Configuration("double-1.0", 12))
            assert_refused(there, feed(there, head + rng.randbytes(300), tmp_path / "s"), head)


def test_random_bytes_on_a_listener_that_goes_on_listening() -> None:
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    with hosts(guest, DoubleGuest(PAGES, running=False)) as (here, there):
        address = there.controller.incoming(TCP)
        port = int(address.rpartition(":")[2])
        rng = random.Random(8)
        for count in range(1, 20):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(rng.randbytes(2000))
            there.wait_status(FAILED, count)
            assert "this is no migration stream" in there.controller.info().error
        assert here.migrate(address).status is COMPLETED


SETUP = (
    sections.header(sections.Configuration("double-1.0", 12))
    + sections.section_start(1, "ram", 0, 4)
    + ram_setup([("double.ram", PAGES * 4096)])
    + sections.footer(1)
)
NAME = b"\x0adouble.ram"


def be64(value: int) -> bytes:
    return value.to_bytes(8, "big")


@pytest.mark.parametrize(
    ("tail", "text"),
    [
        (sections.section_part(1) + be64(PAGES * 4096 | 8) + NAME + bytes(4096), "outside RAM block"),
        (sections.section_part(1) + be64((1 << 63) | 8) + NAME + bytes(4096), "outside RAM block"),
        (sections.section_part(1) + be64((1 << 64) - 4096 | 2) + NAME + b"\0", "outside RAM block"),
        (
            sections.section_part(1) + be64(8) + b"\x03rom" + bytes(4096),
            "'rom', which is not in the list of RAM blocks",
        ),
        (sections.section_part(1) + be64(0x40) + NAME + b"\x01\xff\xff", "65535 bytes, more than a page"),
        (sections.section_part(9), "section 9, which has not been started"),
        (sections.section_full(2, "nic", 0, 1) + bytes(100), "the section's footer never came"),
        (sections.section_full(2, "cpu", 0, 99) + bytes(100), "version 99"),
        (sections.section_start(2, "cpu", 0, 1) + bytes(100), "only the ram section may come in parts"),
        (sections.end_of_stream(), "before the last part of: ram"),
        (sections.section_end(1) + be64(16) + sections.footer(1) + b"\0", "page at 0x0 never came"),
        (sections.command(7, bytes(4)), "command 0x7 is not supported"),
        (sections.command(0x5302), "command 0x5302 is not supported"),
    ],
)
def test_streams_that_lie(tail: bytes, text: str, tmp_path: Path) -> None:
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, SETUP + tail, tmp_path / "s")
        assert_refused(there, info, tail)
        assert text in info.error
        assert "offset" in info.error


def test_lengths_of_the_setup_are_checked_before_anything_is_allocated(tmp_path: Path) -> None:
    opening = sections.header(sections.Configuration("double-1.0", 12)) + sections.section_start(
        1, "ram", 0, 4
    )
    body = be64((1 << 63) | 4) + NAME + be64(1 << 63)
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, opening + body + be64(16) + sections.footer(1), tmp_path / "s")
        assert_refused(there, info, "length")
        assert "Size mismatch: double.ram: 0x8000000000000000 != 0x3000" in info.error


def test_devices_that_the_guest_does_not_take_are_refused(stream: bytes, tmp_path: Path) -> None:
    """A stream without digests, so that only the guest itself can object."""
    plain = tmp_path / "plain"
    guest = DoubleGuest(PAGES, steps_per_ms=0)
    with hosts(guest) as (here,):
        assert here.migrate(f"file:{plain}").status is COMPLETED
    data = bytearray(plain.read_bytes())
    at = data.index(b"\x03cpu") + 4 + 8 + 16
    assert data[at : at + 4] == b"\0\0\0\1"
    data[at] = 9
    with hosts(DoubleGuest(PAGES, running=False)) as (there,):
        info = feed(there, bytes(data), tmp_path / "s")
        assert_refused(there, info, "cpu")
        assert info.error == "section 'cpu': running is neither 0 nor 1"
