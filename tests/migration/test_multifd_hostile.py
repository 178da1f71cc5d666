"""Multifd channels of a source that is broken or means harm: the destination says what is wrong, touches nothing but its own RAM,
and never starts the guest.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import Struct, structs
from tests.migration.pairs import TCP, Host, hosts, source_guest, waiting_guest
from tests.migration.proxy import Fault, Proxy

from sterna.memory.ram import RamBlock
from sterna.migration import handshake
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.destination import listen
from sterna.migration.destination.multifd import pending, receiver
from sterna.migration.destination.multifd.channel import ReceiveChannel
from sterna.migration.handshake import Offer
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import OwnershipState
from sterna.stream import sections
from sterna.stream.multifd.compression import compressor
from sterna.stream.multifd.format import NO_UUID, Compression, Init, Packet, PacketFormat
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.testing.guest import DoubleGuest

PAGES = 8
SECONDS = 300
FORMAT = PacketFormat(12)
FAILED, COMPLETED, CANCELLED = MigrationStatus.FAILED, MigrationStatus.COMPLETED, MigrationStatus.CANCELLED
SYNC = FORMAT.encode(Packet(sync=True))
BLOCK = "double.ram"


def packet(*pages: int, data: bytes | None = None, **changes: object) -> bytes:
    numbers = np.array(pages, dtype=np.int64)
    data = bytes(range(1, 129)) * 32 * len(pages) if data is None else data
    header = replace(Packet(False, Compression.NONE, BLOCK, numbers, len(data)), **changes)  # type: ignore[arg-type]
    return FORMAT.encode(header) + data


class RawSource:
    """The stream of a source without a return path, piece by piece. Connections are made when told."""

    def __init__(self, uri: str) -> None:
        self._port = int(uri.rpartition(":")[2])
        self._open = ExitStack()
        self._main = self.connect()
        self.channels: list[socket.socket] = []

    def connect(self) -> socket.socket:
        return self._open.enter_context(socket.create_connection(("127.0.0.1", self._port), SECONDS))

    def channel(self, index: int, uuid: bytes = NO_UUID) -> socket.socket:
        made = self.connect()
        made.sendall(Init(uuid, index).encode())
        self.channels.append(made)
        return made

    def begin(self) -> None:
        setup = sections.section_start(1, "ram", 0, 4) + ram_setup([(BLOCK, PAGES * 4096)])
        self._main.sendall(
            sections.header(sections.Configuration("double-1.0", 12)) + setup + sections.footer(1)
        )

    def part(self, records: bytes = b"") -> None:
        self._main.sendall(sections.section_part(1) + records + END_OF_RECORDS + sections.footer(1))

    def finish(self) -> None:
        """The last part, devices as a guest has them that has not run, and the end."""
        out = sections.section_end(1) + END_OF_RECORDS + sections.footer(1)
        with DoubleGuest(PAGES, running=False) as guest:
            for section_id, state in enumerate(guest.save_devices(), 2):
                out += sections.device_section(section_id, guest.descriptions[state.name], state)
        self._main.sendall(out + sections.end_of_stream() + sections.vm_description(b"{}"))

    def close(self) -> None:
        self._open.close()


@contextmanager
def attempt(channels: int = 2) -> Iterator[tuple[Host, RawSource]]:
    with hosts(waiting_guest(PAGES)) as (there,):
        there.controller.set_capabilities({"multifd": True})
        there.controller.set_parameters({"multifd-channels": channels})
        source = RawSource(there.controller.incoming(TCP))
        try:
            yield there, source
        finally:
            source.close()


def assert_refused(there: Host, complaint: str) -> None:
    there.wait_status(FAILED)
    info = there.outcome()
    assert complaint in info.error
    assert "\n" not in info.error
    assert not there.guest.running
    assert not there.guest.block.data.any()


def test_the_source_of_these_tests_is_good() -> None:
    with attempt() as (there, source):
        channels = [source.channel(1), source.channel(0)]
        source.begin()
        channels[0].sendall(SYNC + packet(*range(5), sync=True) + FORMAT.encode(Packet()) + packet(7))
        channels[1].sendall(SYNC + packet(6, 5) + SYNC + SYNC)
        source.part()
        channels[0].sendall(SYNC)
        source.finish()
        there.wait_status(COMPLETED)
        info = there.outcome()
        assert info.normal_pages == PAGES
        assert (there.guest.block.data.reshape(-1, 128) == np.arange(1, 129)).all()
        assert not channels[0].recv(1), "the destination has let go of its channels"


def test_what_comes_later_is_put_in_place_later() -> None:
    """A page comes three times, each time on another channel, and each channel is ahead of the other."""
    with attempt() as (there, source):
        zero, one = source.channel(0), source.channel(1)
        source.begin()
        source.part(zero_record(3))
        one.sendall(SYNC + SYNC + packet(3, data=b"\2" * 4096) + SYNC + SYNC)
        zero.sendall(SYNC + packet(*(n for n in range(PAGES) if n != 3)) + SYNC)
        zero.sendall(SYNC + packet(3, data=b"\3" * 4096) + SYNC)
        source.part()
        source.finish()
        there.wait_status(COMPLETED)
        assert (there.guest.block.data[3 * 4096 :][:4096] == 3).all()


def zero_record(page: int) -> bytes:
    name = BLOCK.encode()
    return (page << 12 | 2).to_bytes(8, "big") + bytes((len(name),)) + name + b"\0"


def wait_for_thread(name: str) -> None:
    deadline = time.monotonic() + SECONDS
    while name not in {thread.name for thread in threading.enumerate()}:
        assert time.monotonic() < deadline, f"no thread {name}"
        threading.Event().wait(0.01)


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (packet(PAGES), "page offset 0x8000 is outside RAM block 'double.ram' of 0x8000 bytes"),
        (packet(0, PAGES - 1, 2**51), "is outside RAM block"),
        (packet(0, block="nvram"), "pages of RAM block 'nvram', which does not exist here"),
        (packet(0)[:-1], "ended within a packet"),
        (packet(0)[:900], "ended within a packet"),
        (packet(0)[:1], "ended within a packet"),
        (b"", "ended before the migration did"),
        (packet(0), "ended before the migration did"),
        (b"\0" * 1344, "no multifd packet: it begins with 0x00000000"),
        (packet(0, data=bytes(4095)), "1 pages with 4095 bytes of data instead of 4096"),
        (packet(0, data=b"\xff" * 99, compression=Compression.ZLIB), "damaged zlib data"),
        (packet(0, data=b"\xff" * 99, compression=Compression.ZSTD), "damaged zstd data"),
        (
            packet(0) + packet(1, data=b"0", compression=Compression.ZSTD),
            "compression zstd after others with none",
        ),
    ],
)
def test_a_channel_that_goes_wrong_is_named(data: bytes, complaint: str) -> None:
    with attempt() as (there, source):
        source.channel(0).sendall(SYNC + SYNC)
        source.begin()
        source.part()
        channel = source.channel(1)
        # One that has ended before anybody looked at it counts as left over from another attempt.
        for index in range(2):
            wait_for_thread(f"multifd-receive-{index}")
        channel.sendall(SYNC + data)
        with suppress(OSError):  # refused and reset already
            channel.shutdown(socket.SHUT_WR)
        assert_refused(there, complaint)
        assert "multifd channel 1" in there.outcome().error
        assert not source.channels[0].recv(1), "all channels end with the attempt"


@pytest.mark.slow
@pytest.mark.parametrize("compression", [Compression.ZLIB, Compression.ZSTD])
def test_a_piece_that_inflates_beyond_its_pages_is_refused(compression: Compression) -> None:
    bomb = compressor(compression, 9)(bytes(256 << 20))
    with attempt(1) as (there, source):
        source.begin()
        source.channel(0).sendall(SYNC + packet(0, 1, data=bomb, compression=compression))
        source.part()
        assert_refused(there, "more than the 8192 bytes of the packet's pages")


@pytest.mark.parametrize(
    ("connect", "complaint"),
    [
        (lambda source: (source.channel(0), source.channel(0)), "multifd channel 0 connected twice"),
        (lambda source: source.channel(2), "multifd channel 2 connected, but multifd-channels is 2 here"),
        (lambda source: source.channel(0, b"\x11" * 16), "multifd: received uuid '11111111-"),
    ],
)
def test_a_connection_that_is_no_channel_of_this_migration(
    connect: Callable[[RawSource], object], complaint: str
) -> None:
    with attempt() as (there, source):
        source.begin()
        connect(source)
        assert_refused(there, complaint)


@pytest.mark.parametrize("channels", [0, 2])
def test_a_stray_channel_does_not_end_a_migration_between_sternas(channels: int) -> None:
    """A local process connects and says what a channel says, before the source is known and after that."""
    with hosts(source_guest(), waiting_guest()) as (here, there), ExitStack() as stack:
        for host in (here, there):
            host.controller.set_capabilities({"multifd": bool(channels)})
            host.controller.set_parameters({"multifd-channels": channels or 1})
        here.controller.set_parameters({"max-bandwidth": 1000})
        uri = there.controller.incoming(TCP)
        address = ("127.0.0.1", int(uri.rpartition(":")[2]))

        def stray(init: Init) -> socket.socket:
            made = stack.enter_context(socket.create_connection(address, SECONDS))
            made.sendall(init.encode())
            return made

        early = [stray(Init(NO_UUID, index)) for index in range(2)]
        wait_for_thread("incoming-connection")
        here.controller.migrate(uri)
        here.wait_status(MigrationStatus.ACTIVE)
        late = [stray(Init(NO_UUID, 0)), stray(Init(b"x" * 16, 1, b"y" * 16))]
        for stranger in (*early, *late):
            assert not stranger.recv(1), "the destination has let go of it"
        assert here.controller.info().status is MigrationStatus.ACTIVE
        here.controller.set_parameters({"max-bandwidth": 0})
        info = here.outcome()
        assert info.status is COMPLETED, info.error


@pytest.mark.parametrize("token", ["zz", "12" * 8])
def test_channels_of_a_source_that_states_another_token_are_not_taken(
    token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receiver, "CONNECT_SECONDS", 0.3)
    encode = handshake.encode

    def lie(payload: Struct) -> bytes:
        return encode(structs.replace(payload, token=token) if isinstance(payload, Offer) else payload)

    monkeypatch.setattr(handshake, "encode", lie)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": True})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is FAILED
        assert "multifd" in info.error
        assert here.guest.ownership.state is OwnershipState.OWNER


def test_a_sterna_that_gives_its_channels_no_token_is_taken_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one of version 0.1 does."""
    encode = handshake.encode

    def older(payload: Struct) -> bytes:
        return encode(structs.replace(payload, token="") if isinstance(payload, Offer) else payload)

    monkeypatch.setattr(handshake, "encode", older)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": True})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is COMPLETED, info.error


def give_up_only_when(
    ready: Callable[[receiver.MultifdReceiver], bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For how long the channels are waited for counts when this is so: until then a busy machine may hold them up."""
    check_time = receiver.MultifdReceiver._check_time

    def check(self: receiver.MultifdReceiver, seconds: float, silence_seconds: float | None) -> None:
        if ready(self):
            check_time(self, seconds, silence_seconds)

    monkeypatch.setattr(receiver.MultifdReceiver, "_check_time", check)


def test_a_channel_that_never_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(receiver, "CONNECT_SECONDS", 0.3)
    with attempt(3) as (there, source), monkeypatch.context() as patch:
        give_up_only_when(lambda receiver: 1 in receiver._channels, patch)
        source.begin()
        source.channel(1)
        assert_refused(there, "multifd channel 0 did not connect within 0 s: 1 of 3 did")
    with attempt(3) as (there, source):
        source.begin()
        assert_refused(there, "no channel connected within 0 s: is it on at the source?")


def test_a_channel_that_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sterna.migration.destination.listen.SILENCE_SECONDS", 0.3)
    give_up_only_when(lambda receiver: 0 in receiver._arrived, monkeypatch)
    with attempt(2) as (there, source):
        source.channel(0).sendall(SYNC)
        source.channel(1).sendall(packet(0)[:2000])
        source.begin()
        assert_refused(there, "multifd channel 1 did not go on for 0.3 s")


def test_pages_after_the_last_sync_stay_out_of_the_guest() -> None:
    with attempt(1) as (there, source):
        channel = source.channel(0)
        source.begin()
        channel.sendall(SYNC + packet(*range(PAGES)) + SYNC + packet(0, data=b"\xee" * 4096))
        source.finish()
        there.wait_status(COMPLETED)
        there.controller.close()
        assert not (there.guest.block.data == 0xEE).any()


def test_channels_whose_peers_have_gone_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as may connect wait for their migration, and go: a source that comes right after does not wait for the next
    poll."""
    monkeypatch.setattr(pending, "_POLL_SECONDS", 600.0)
    waiting = threading.Semaphore(0)
    hung_up = SocketChannel.hung_up

    def noted(channel: SocketChannel) -> bool:
        gone = hung_up(channel)
        waiting.release()
        return gone

    monkeypatch.setattr(SocketChannel, "hung_up", noted)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": True})
        uri = there.controller.incoming(TCP)
        with ExitStack() as stack:
            for index in range(listen._CONNECTION_LIMIT + 2):
                address = ("127.0.0.1", int(uri.rpartition(":")[2]))
                stranger = stack.enter_context(socket.create_connection(address, SECONDS))
                stranger.sendall(Init(NO_UUID, 100 + index).encode())
                assert waiting.acquire(timeout=SECONDS)
        info = here.migrate(uri)
        assert info.status is COMPLETED, info.error


def test_channels_that_nobody_needs_are_let_go() -> None:
    """More than wait at once, without any main channel; then a good migration."""
    with hosts(source_guest(), waiting_guest()) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities({"multifd": True})
        uri = there.controller.incoming(TCP)
        with ExitStack() as stack:
            strangers = []
            for index in range(20):
                stranger = socket.create_connection(("127.0.0.1", int(uri.rpartition(":")[2])), SECONDS)
                strangers.append(stack.enter_context(stranger))
                stranger.sendall(Init(NO_UUID, 100 + index).encode())
        info = here.migrate(uri)
        assert info.status is COMPLETED, info.error


@pytest.mark.parametrize("goes", [True, False])
def test_a_channel_without_a_main_channel_is_let_go(goes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an attempt that is over, say: at once when its peer has gone, otherwise after a while, whatever else happens."""
    monkeypatch.setattr(pending, "WAIT_SECONDS", 600.0 if goes else 0.3)
    with attempt() as (there, source):
        channel = source.channel(0)
        wait_for_thread("incoming-connection")
        if goes:
            channel.shutdown(socket.SHUT_WR)
        assert not channel.recv(1), "the destination has let go of it"
        assert there.controller.info().status is MigrationStatus.SETUP


def test_cut_at_some_bytes_of_a_channel() -> None:
    """Whatever has come of a channel when it is cut: the guest has one owner, and its source names the channel."""
    with hosts(DoubleGuest(40, steps_per_ms=0), waiting_guest(40)) as (here, there):
        here.guest.advance_steps(40)
        for host in (here, there):
            host.controller.set_capabilities({"multifd": True})
        port = int(there.controller.incoming(TCP).rpartition(":")[2])
        for at in (0, 30, 64, 1000, 64 + 1344, 64 + 2 * 1344 + 7):
            for reset in (False, True):
                there.events.clear()
                with Proxy(port, Fault(forward=at, reset=reset, victim=2)) as proxy:
                    info = here.migrate(proxy.uri)
                assert info.status is FAILED, at
                assert "multifd channel 1" in info.error, (at, info.error)
                if there.events:
                    there.controller.wait(SECONDS)
                assert here.guest.running
                assert not here.guest.logging
                assert not there.guest.running


@contextmanager
def deaf_destination(channels: int) -> Iterator[tuple[str, threading.Event]]:
    """A QEMU that answers the greeting, reads the main channel, and never a byte of the others.

    :return: its URI, and what says that the channels have come
    """
    all_there, stop = threading.Event(), threading.Event()

    def serve(listener: socket.socket) -> None:
        with ExitStack() as stack:
            main = stack.enter_context(listener.accept()[0])
            for _ in range(channels):
                stack.enter_context(listener.accept()[0])
            main.sendall(bytes.fromhex("0002 0004 53544e41"))
            all_there.set()
            main.settimeout(0.1)
            while not stop.is_set():
                try:
                    if not main.recv(1 << 16):
                        return
                except TimeoutError:
                    pass

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield f"tcp:127.0.0.1:{listener.getsockname()[1]}", all_there
        finally:
            stop.set()
            thread.join()


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
def test_a_destination_that_stops_reading_its_channels_holds_no_cancel(compression: str) -> None:
    guest = DoubleGuest(16384)
    guest.block.data[:] = np.random.default_rng(1).integers(0, 256, guest.block.size, dtype=np.uint8)
    with hosts(guest) as (here,), deaf_destination(3) as (uri, all_there):
        here.controller.set_capabilities({"multifd": True})
        here.controller.set_parameters(
            {"multifd-channels": 3, "multifd-compression": compression, "max-bandwidth": 0}
        )
        here.controller.migrate(uri)
        assert all_there.wait(SECONDS)
        here.wait_pass(1)
        # Until nothing moves any more: the sockets are full.
        before = -1
        while (now := here.controller.info().transferred) != before:
            before = now
            here.controller.wait(0.3)
        here.controller.cancel()
        info = here.outcome()
        assert info.status is CANCELLED, info.error
        assert guest.running
        assert not guest.logging
        assert not [t for t in threading.enumerate() if t.name == "multifd-send"]


def test_a_channel_that_talks_back_fails_the_migration() -> None:
    guest = source_guest(64)
    with hosts(guest) as (here,), socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        here.controller.set_capabilities({"multifd": True})
        here.controller.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        main = stack.enter_context(listener.accept()[0])
        channels = [stack.enter_context(listener.accept()[0]) for _ in range(2)]
        channels[1].sendall(b"?")
        main.sendall(bytes.fromhex("0002 0004 53544e41"))
        info = here.outcome()
        assert info.status is FAILED
        assert f"multifd channel 1 of {info.uri} sent something" in info.error
        assert guest.running


class Alone:
    """Meets nobody."""

    error: Exception | None = None

    def arrive(self, channel: ReceiveChannel) -> bool:
        return True

    def leave(self, channel: ReceiveChannel, error: Exception | None) -> None:
        self.error = error


GUARD = 0xA5


def receive(data: bytes) -> tuple[Exception | None, RamBlock]:
    """What a channel makes of bytes; RAM around the block stays as it is."""
    around = RamBlock("around", (PAGES + 4) * 4096)
    around.data[:] = GUARD
    inside = RamBlock.__new__(RamBlock)
    inside.name, inside.size, inside.hva = BLOCK, PAGES * 4096, around.hva + 2 * 4096  # type: ignore[assignment]
    inside.data = around.data[2 * 4096 :][: PAGES * 4096]
    here, there = socket.socketpair()
    alone = Alone()
    written = np.zeros(1, dtype=np.uint8)
    with Cancellation() as cancellation, SocketChannel(cancellation, "test", there) as channel:
        receiving = ReceiveChannel(0, channel, {BLOCK: inside}, 12, {BLOCK: written}, alone)
        receiving.start()
        try:
            here.sendall(data)
        except OSError:
            pass  # refused before all of it was read
        here.close()
        receiving.join()
    assert (around.data[: 2 * 4096] == GUARD).all()
    assert (around.data[(PAGES + 2) * 4096 :] == GUARD).all()
    assert written[0] or alone.error or (inside.data == GUARD).all()
    return alone.error, inside


VALID = {
    compression: b"".join(
        packet(
            *pages,
            data=data if compression is Compression.NONE else coder(data),
            compression=compression,
        )
        for pages, data in (((0, 1, 2), bytes(range(256)) * 48), ((7, 3), b"q" * 8192), ((5,), bytes(4096)))
    )
    + SYNC
    for compression, coder in (
        (Compression.NONE, compressor(Compression.ZLIB, 1)),
        (Compression.ZLIB, compressor(Compression.ZLIB, 1)),
        (Compression.ZSTD, compressor(Compression.ZSTD, 1)),
    )
}


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from(sorted(VALID, key=lambda c: c.value)),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(1, 255)), max_size=6),
    st.one_of(st.none(), st.integers(0, 1 << 20)),
    st.binary(max_size=40),
)
def test_whatever_comes_on_a_channel_stays_within_the_block(
    compression: Compression, damage: list[tuple[int, int]], cut: int | None, more: bytes
) -> None:
    data = bytearray(VALID[compression])
    for at, mask in damage:
        data[at % len(data)] ^= mask
    if cut is not None:
        del data[cut % (len(data) + 1) :]
    error, _ = receive(bytes(data) + more)
    if error is not None:
        assert "Error" not in str(error), error


def test_the_streams_of_the_fuzz_test_are_good() -> None:
    for compression, data in VALID.items():
        error, block = receive(data)
        assert error is None, compression
        assert block.data[: 3 * 4096].tobytes() == bytes(range(256)) * 48
        assert (block.data[7 * 4096 :] == ord("q")).all()
