"""The virtio network device: negotiation, rings, drivers that break the rules, and what it writes being logged."""

import re
import struct
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.machine.virtiodriver import (
    AVAIL,
    BASE,
    DESC,
    ENTRIES,
    INDIRECT,
    MAC,
    NEXT,
    RAM_BYTES,
    USED,
    WRITE,
    Rig,
    rig,
)

from sterna.boards.vexpress_a15 import BOARD as VEXPRESS_A15
from sterna.machine.virtio.bus import VirtioBus
from sterna.machine.virtio.mmio import Interrupt, Register, Status
from sterna.machine.virtio.net import MAX_FRAME_BYTES, announcement
from sterna.memory.bitmap import page_numbers

TIMEOUT = 300.0
BUFFERS = BASE + 0x20_0000
FRAME = bytes(range(60))
HEADER = bytes(12)
TX = 0x1_0000
"""From the addresses of queue 0 to those of queue 1."""


@pytest.fixture
def device() -> Iterator[Rig]:
    with rig() as made:
        yield made


def wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


def give_buffer(device: Rig, index: int = 0, length: int = 2048) -> None:
    device.describe(0, index, BUFFERS + 4096 * index, length, WRITE)
    device.offer(0, index)


def send(device: Rig, frame: bytes = FRAME, index: int = 0) -> None:
    data = HEADER + frame
    device.poke(BUFFERS + 4096 * index, data)
    device.describe(1, index, BUFFERS + 4096 * index, len(data))
    device.offer(1, index)


# -- transport -----------------------------------------------------------------------------------------------------------


def test_it_tells_what_it_is(device: Rig) -> None:
    assert device.read(Register.MAGIC).to_bytes(4, "little") == b"virt"
    assert device.read(Register.VERSION) == 2
    assert device.read(Register.DEVICE_ID) == 1
    device.write(Register.DEVICE_FEATURES_SEL, 1)
    assert device.read(Register.DEVICE_FEATURES) == 1, "VERSION_1"
    device.write(Register.DEVICE_FEATURES_SEL, 0)
    assert device.read(Register.DEVICE_FEATURES) == 1 << 5 | 1 << 16, "MAC and STATUS"
    device.write(Register.DEVICE_FEATURES_SEL, 7)
    assert device.read(Register.DEVICE_FEATURES) == 0
    for number, limit in ((0, 256), (1, 256), (2, 0), (0xFFFF_FFFF, 0)):
        device.write(Register.QUEUE_SEL, number)
        assert device.read(Register.QUEUE_NUM_MAX) == limit


def test_its_configuration_is_read_at_any_width(device: Rig) -> None:
    assert bytes(device.read(0x100 + i, 1) for i in range(6)) == MAC
    assert device.read(0x106, 2) == 1, "the link is up"
    assert device.read(0x100, 4).to_bytes(4, "little") == MAC[:4]
    assert device.read(0x100 + 200, 4) == 0
    device.write(0x100, 0xFFFF_FFFF)
    assert device.read(0x100, 4).to_bytes(4, "little") == MAC[:4], "read-only"


def test_a_bus_has_transports_without_a_device(device: Rig) -> None:
    bus = VirtioBus(VEXPRESS_A15.virtio, device.ram, lambda irq: device.levels.append)
    bus.add(lambda port: device.net)
    assert bus.mmio_read(0x200 * 3 + Register.DEVICE_ID, 4, 0) == 1
    assert bus.mmio_read(0x200 * 2 + Register.MAGIC, 4, 0) == device.read(Register.MAGIC)
    assert bus.mmio_read(0x200 * 2 + Register.DEVICE_ID, 4, 0) == 0
    bus.mmio_write(0x200 * 2 + Register.STATUS, 4, 1, 0)
    assert device.read(Register.STATUS) == 0
    bus.mmio_write(0x200 * 3 + Register.STATUS, 4, 1, 0)
    assert device.read(Register.STATUS) == 1


@pytest.mark.parametrize(
    ("low", "high", "taken"),
    [(0, 1, True), (1 << 5 | 1 << 16, 1, True), (1, 1, False), (0, 0, False), (0, 3, False)],
)
def test_features_are_taken_as_a_whole_or_not(device: Rig, low: int, high: int, taken: bool) -> None:
    assert bool(device.negotiate(low, high) & Status.FEATURES_OK) is taken
    before = device.net.transport.save().driver_features
    device.write(Register.DRIVER_FEATURES_SEL, 0)
    device.write(Register.DRIVER_FEATURES, 1 << 16)
    assert (device.net.transport.save().driver_features == before) is (taken or before == 1 << 16)


def test_a_queue_is_not_changed_while_it_is_used(device: Rig) -> None:
    device.start()
    device.write(Register.QUEUE_SEL, 0)
    device.write(Register.QUEUE_NUM, 4)
    device.write(Register.QUEUE_DESC_LOW, 0)
    queue = device.net.transport.save().queues[0]
    assert (queue.num, queue.desc, queue.ready) == (ENTRIES, DESC, True)


@pytest.mark.parametrize("entries", [0, 3, 512, 0xFFFF_FFFF])
def test_a_queue_of_an_impossible_size_is_not_ready(device: Rig, entries: int) -> None:
    device.negotiate()
    device.write(Register.QUEUE_SEL, 0)
    device.write(Register.QUEUE_NUM, entries)
    device.write(Register.QUEUE_READY, 1)
    assert device.read(Register.QUEUE_READY) == 0


def test_a_reset_makes_it_as_new(device: Rig) -> None:
    new = device.net.transport.save()
    device.start()
    send(device)
    assert device.network.far.recv(4096) == FRAME
    wait(lambda: device.levels[-1:] == [True])
    device.write(Register.STATUS, 0)
    assert device.net.transport.save() == new
    assert device.levels[-1] is False


# -- frames --------------------------------------------------------------------------------------------------------------


def test_frames_go_out(device: Rig) -> None:
    device.start()
    # One frame in three descriptors, the header in two of them.
    device.poke(BUFFERS, HEADER + FRAME)
    for index, (at, length) in enumerate(((0, 5), (5, 20), (25, 47))):
        device.describe(1, index, BUFFERS + at, length, NEXT if index < 2 else 0, index + 1)
    device.offer(1, 0)
    assert device.network.far.recv(4096) == FRAME
    wait(lambda: device.used(1) == [(0, 0)])
    wait(lambda: device.read(Register.INTERRUPT_STATUS) == Interrupt.USED_BUFFER)
    assert device.levels[-1] is True
    device.write(Register.INTERRUPT_ACK, 1)
    assert device.read(Register.INTERRUPT_STATUS) == 0
    assert device.levels[-1] is False


def test_no_interrupt_for_a_driver_that_wants_none(device: Rig) -> None:
    device.start()
    device.poke(AVAIL + TX, struct.pack("<H", 1))
    send(device)
    wait(lambda: device.used(1) == [(0, 0)])
    device.net.pause()
    assert device.read(Register.INTERRUPT_STATUS) == 0


def test_frames_come_in_as_there_is_room(device: Rig) -> None:
    device.start()
    frames = [bytes([number]) * (14 + number) for number in range(20)]
    for frame in frames:
        device.network.far.send(frame)
    got = []
    for number in range(20):
        give_buffer(device, number % ENTRIES)
        wait(lambda: int.from_bytes(device.peek(USED + 2, 2), "little") == number + 1)  # noqa: B023
        head, length = device.used(0)[-1]
        data = device.peek(BUFFERS + 4096 * head, length)
        assert data[:12] == bytes(10) + b"\1\0", "in one buffer"
        got.append(data[12:])
    assert got == frames
    wait(lambda: device.net.counts.received == 20)  # a buffer comes back before its frame is counted


def test_a_frame_is_there_before_its_buffer_comes_back(device: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver on another CPU may look after each write of the device's."""
    device.start()
    write, seen = device.ram.write, []

    def watched(ipa: int, data: bytes | memoryview) -> None:
        write(ipa, data)
        seen.extend((used, device.peek(BUFFERS + 12, len(FRAME))) for used in device.used(0)[len(seen) :])

    monkeypatch.setattr(device.ram, "write", watched)
    device.network.far.send(FRAME)
    give_buffer(device)
    wait(lambda: device.net.counts.received == 1)
    assert seen == [((0, 12 + len(FRAME)), FRAME)]


def test_a_frame_in_several_descriptors(device: Rig) -> None:
    device.start()
    for index, length in enumerate((7, 10, 100)):
        device.describe(
            0, index, BUFFERS + 4096 * index, length, WRITE | (NEXT if index < 2 else 0), index + 1
        )
    device.network.far.send(FRAME)
    device.offer(0, 0)
    wait(lambda: device.used(0) == [(0, 72)])
    data = b"".join(device.peek(BUFFERS + 4096 * i, n) for i, n in ((0, 7), (1, 10), (2, 55)))
    assert data[12:] == FRAME


def test_a_frame_too_large_for_its_buffer_is_lost_and_the_buffer_is_not(device: Rig) -> None:
    device.start()
    give_buffer(device, length=len(FRAME) + 12)
    device.network.far.send(FRAME + b"x")
    device.network.far.send(FRAME)
    wait(lambda: device.used(0) == [(0, len(FRAME) + 12)])
    assert device.net.counts.dropped == 1


@pytest.mark.parametrize("size", [0, 13, MAX_FRAME_BYTES + 1])
def test_what_is_no_frame_is_not_sent(device: Rig, size: int) -> None:
    device.start()
    device.poke(BUFFERS, HEADER)
    device.describe(1, 0, BUFFERS, 12 + size)
    device.offer(1, 0)
    send(device, index=1)
    assert device.network.far.recv(4096) == FRAME
    wait(lambda: device.used(1) == [(0, 0), (1, 0)])
    assert device.net.counts.dropped == 1


def test_nothing_moves_while_it_is_paused(device: Rig) -> None:
    device.start()
    device.net.pause()
    before = device.ram.read(BASE, RAM_BYTES)
    device.network.far.send(FRAME)
    give_buffer(device)
    send(device, index=1)
    for _ in range(3):
        assert not device.net.work()
    changed = np.frombuffer(before, np.uint8) != device.ram.block.data
    assert not changed[USED - BASE : USED - BASE + 4096].any()
    assert device.net.counts.received == device.net.counts.sent == 0
    device.net.resume()
    assert device.network.far.recv(4096) == FRAME
    wait(lambda: device.used(0) == [(0, 72)])


def test_a_network_that_goes_away_leaves_a_device_that_sends_to_nobody(device: Rig) -> None:
    device.start()
    device.network.far.close()
    give_buffer(device)
    send(device, index=1)
    wait(lambda: device.net.counts.dropped == 1)
    assert device.read(Register.STATUS) & Status.NEEDS_RESET == 0


# -- the dirty log -------------------------------------------------------------------------------------------------------


def test_what_it_writes_is_logged_and_nothing_else() -> None:
    with rig(logging=True) as device:
        device.start()
        device.ram.harvest()
        give_buffer(device, 5)
        device.network.far.send(FRAME)
        wait(lambda: len(device.used(0)) == 1)
        device.net.pause()
        dirty = page_numbers(device.ram.harvest().words)
        assert [BASE + 4096 * int(page) for page in dirty] == [USED, BUFFERS + 4096 * 5]
        device.net.resume()
        send(device)
        assert device.network.far.recv(4096) == FRAME
        device.net.pause()
        dirty = page_numbers(device.ram.harvest().words)
        assert [BASE + 4096 * int(page) for page in dirty] == [USED + TX]


def test_a_harvest_waits_for_no_access_and_no_access_for_a_harvest() -> None:
    """A vCPU in a device's access cannot flush its TLB, which a harvest may wait for."""
    with rig(logging=True) as device:
        vm = device.ram._vm
        device.start()
        with vm._lock:  # as a harvest holds it
            done = threading.Event()

            def access() -> None:
                send(device)
                device.network.far.recv(4096)
                device.read(Register.STATUS)
                done.set()

            thread = threading.Thread(target=access)
            thread.start()
            assert done.wait(TIMEOUT)
            wait(lambda: device.used(1) == [(0, 0)])
        thread.join()


# -- drivers that break the rules ----------------------------------------------------------------------------------------


def endless(device: Rig) -> None:
    device.describe(1, 0, BUFFERS, 64, NEXT, 1)
    device.describe(1, 1, BUFFERS, 64, NEXT, 0)
    device.offer(1, 0)


def beyond_the_table(device: Rig) -> None:
    device.describe(1, 0, BUFFERS, 64, NEXT, ENTRIES)
    device.offer(1, 0)


def head_beyond_the_table(device: Rig) -> None:
    device.offer(1, 0xFFFF)


def indirect(device: Rig) -> None:
    device.describe(1, 0, BUFFERS, 64, INDIRECT)
    device.offer(1, 0)


def read_after_write(device: Rig) -> None:
    device.describe(1, 0, BUFFERS, 64, WRITE | NEXT, 1)
    device.describe(1, 1, BUFFERS, 64)
    device.offer(1, 0)


def outside_ram(device: Rig) -> None:
    device.describe(1, 0, BASE + RAM_BYTES - 8, 64)
    device.offer(1, 0)


def at_the_end_of_addresses(device: Rig) -> None:
    device.describe(1, 0, (1 << 64) - 8, 64)
    device.offer(1, 0)


def no_header(device: Rig) -> None:
    device.describe(1, 0, BUFFERS, 11)
    device.offer(1, 0)


def too_many_offers(device: Rig) -> None:
    device.poke(BUFFERS, HEADER + FRAME)
    for index in range(ENTRIES):  # nothing else is wrong
        device.describe(1, index, BUFFERS, len(HEADER + FRAME))
    device.poke(AVAIL + TX + 2, struct.pack("<H", ENTRIES + 1))
    device.write(Register.QUEUE_NOTIFY, 1)


def too_many_buffers(device: Rig) -> None:
    for index in range(ENTRIES):
        device.describe(0, index, BUFFERS + 4096 * index, 2048, WRITE)
    device.poke(AVAIL + 2, struct.pack("<H", ENTRIES + 1))
    device.network.far.send(FRAME)
    device.write(Register.QUEUE_NOTIFY, 0)


def receive_outside_ram(device: Rig) -> None:
    device.describe(0, 0, BASE - 32, 64 + 32, WRITE)
    device.network.far.send(FRAME)
    device.offer(0, 0)


def receive_into_nothing(device: Rig) -> None:
    device.describe(0, 0, BUFFERS, 2048)
    device.network.far.send(FRAME)
    device.offer(0, 0)


BROKEN = [
    endless,
    beyond_the_table,
    head_beyond_the_table,
    indirect,
    read_after_write,
    outside_ram,
    at_the_end_of_addresses,
    no_header,
    too_many_offers,
    too_many_buffers,
    receive_outside_ram,
    receive_into_nothing,
]


@pytest.mark.parametrize("breach", BROKEN, ids=[breach.__name__ for breach in BROKEN])
def test_a_broken_driver_stops_its_device_until_a_reset(device: Rig, breach: Callable[[Rig], None]) -> None:
    device.start()
    breach(device)
    wait(lambda: bool(device.read(Register.STATUS) & Status.NEEDS_RESET))
    assert device.read(Register.INTERRUPT_STATUS) == Interrupt.CONFIG
    assert device.net.counts.sent == device.net.counts.received == 0
    device.write(Register.STATUS, Status.DRIVER_OK)
    assert device.read(Register.STATUS) & Status.NEEDS_RESET, "by a reset only"
    device.start()
    send(device)
    assert device.network.far.recv(4096) == FRAME


def test_a_driver_that_is_wrong_again_and_again_does_not_fill_the_log(
    device: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(70):
        device.start()
        no_header(device)
        wait(lambda: bool(device.read(Register.STATUS) & Status.NEEDS_RESET))
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 7, lines
    assert all("it waits for a reset" in line for line in lines)
    left_out = [re.search(r"\((\d+) more since", line) for line in lines]
    assert [int(found[1]) if found else 0 for found in left_out] == [0, 0, 1, 3, 7, 15, 31]


@pytest.mark.parametrize(
    "register", [Register.QUEUE_DESC_LOW, Register.QUEUE_DRIVER_LOW, Register.QUEUE_DEVICE_LOW]
)
@pytest.mark.parametrize("address", [0, BASE + RAM_BYTES - 2, BASE - 16, (1 << 64) - 4])
def test_rings_that_are_not_in_ram(device: Rig, register: Register, address: int) -> None:
    device.start()
    device.write(Register.STATUS, 0)
    device.negotiate()
    device.write(Register.QUEUE_SEL, 1)
    device.write(Register.QUEUE_NUM, ENTRIES)
    for low, good in (
        (Register.QUEUE_DESC_LOW, DESC),
        (Register.QUEUE_DRIVER_LOW, AVAIL),
        (Register.QUEUE_DEVICE_LOW, USED),
    ):
        value = address if low is register else good + TX
        device.write(low, value & 0xFFFF_FFFF)
        device.write(low + 4, value >> 32)
    device.write(Register.QUEUE_READY, 1)
    device.write(Register.STATUS, device.read(Register.STATUS) | Status.DRIVER_OK)
    device.offered = [0, 0]
    send(device)
    wait(lambda: bool(device.read(Register.STATUS) & Status.NEEDS_RESET))


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), spread=st.sampled_from([0, 8, 20]), notifies=st.integers(1, 4))
def test_whatever_is_in_the_rings(seed: int, spread: int, notifies: int) -> None:
    """No driver makes the device fail, write outside RAM, or write what is not logged."""
    random = np.random.default_rng(seed)
    with rig(logging=True) as device:
        device.net.pause()
        device.start()
        for queue in (0, 1):
            for index in range(ENTRIES):
                near = BASE + int(random.integers(0, RAM_BYTES))
                address = near if random.integers(4) else int(random.integers(0, 2**63))
                length = int(random.integers(0, 1 << spread)) if spread else 100
                flags, after = (
                    int(random.integers(0, n)) for n in (4 if random.integers(8) else 65536, ENTRIES + 1)
                )
                device.describe(queue, index, address, length, flags, after)
            ring = random.integers(0, ENTRIES, ENTRIES, dtype=np.uint16).astype("<u2").tobytes()
            device.poke(
                AVAIL + TX * queue, struct.pack("<HH", 0, int(random.integers(0, ENTRIES + 2))) + ring
            )
        for _ in range(notifies):
            device.network.far.send(random.bytes(int(random.integers(14, 3000))))
        before = device.ram.read(BASE, RAM_BYTES)
        device.ram.harvest()
        device.network.far.setblocking(False)
        device.net.resume()
        rounds = 0
        while device.net.work():
            rounds += 1
            assert rounds <= 3 * (ENTRIES + 1) + notifies
        device.net.pause()
        differ = np.frombuffer(before, np.uint8) != device.ram.block.data
        changed = set(np.flatnonzero(differ.reshape(-1, 4096).any(axis=1)).tolist())
        assert changed <= set(page_numbers(device.ram.harvest().words).tolist())


# -- announcements -------------------------------------------------------------------------------------------------------


def test_the_announcement_is_a_reverse_arp_request() -> None:
    assert announcement(MAC).hex() == (
        "ffffffffffff525400123456803500010800060400035254001234560000000052540012345600000000" + "00" * 18
    )


def test_it_announces_its_guest_once_it_runs(device: Rig) -> None:
    device.net.pause()
    device.net.announce([0.0, 0.01, 0.01])
    assert device.net.counts.announced == 0
    device.net.resume()
    for _ in range(3):
        assert device.network.far.recv(4096) == announcement(MAC)
    wait(lambda: device.net.counts.announced == 3)
