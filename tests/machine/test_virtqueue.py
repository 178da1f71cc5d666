"""The device's side of a virtqueue, against a driver that looks at every moment and one that asks for too much."""

import struct
from collections.abc import Callable

import pytest

from sterna.machine.guestram import AddressError
from sterna.machine.virtio.queue import QueueError, QueueState, Virtqueue

SIZE = 0x4000
ENTRIES = 4
DESC, AVAIL, USED, BUFFERS = 0x0000, 0x1000, 0x2000, 0x3000
NEXT, WRITE, INDIRECT = 1, 2, 4


class WatchedMemory:
    """Memory whose `watch` is called after each write, as a driver on another CPU may look then."""

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.watch: Callable[[], None] = lambda: None

    def read(self, ipa: int, size: int) -> bytes:
        if ipa + size > SIZE:
            raise AddressError("outside")
        return bytes(self.data[ipa : ipa + size])

    def write(self, ipa: int, data: bytes | memoryview) -> None:
        if ipa + len(data) > SIZE:
            raise AddressError("outside")
        self.data[ipa : ipa + len(data)] = data
        self.watch()


class Driver:
    """A queue of `ENTRIES`, and what its driver does and sees.

    :param start: where the indices of both rings begin
    """

    def __init__(self, start: int = 0) -> None:
        self.memory = WatchedMemory()
        self.queue = Virtqueue(256, self.memory)
        self.queue.state = QueueState(
            256, ENTRIES, True, DESC, AVAIL, USED, last_avail=start, used_index=start
        )
        self.taken = start
        self.offered = start
        self.poke(AVAIL, "<HH", 0, start)
        self.poke(USED, "<HH", 0, start)

    def poke(self, at: int, layout: str, *values: int) -> None:
        struct.pack_into(layout, self.memory.data, at, *values)

    def describe(self, index: int, flags: int = 0, after: int = 0) -> None:
        self.poke(DESC + 16 * index, "<QIHH", BUFFERS + 16 * index, 16, flags, after)

    def offer(self, head: int) -> None:
        self.poke(AVAIL + 4 + 2 * (self.offered % ENTRIES), "<H", head)
        self.offered = self.offered + 1 & 0xFFFF
        self.poke(AVAIL + 2, "<H", self.offered)

    def collect(self) -> list[tuple[int, int]]:
        """Head and bytes written of what the used ring says has come back since the last call."""
        index = struct.unpack_from("<H", self.memory.data, USED + 2)[0]
        found = []
        while self.taken != index:
            found.append(struct.unpack_from("<II", self.memory.data, USED + 4 + 8 * (self.taken % ENTRIES)))
            self.taken = self.taken + 1 & 0xFFFF
        return found


@pytest.mark.parametrize("start", [0, 65534, 65535])
def test_a_driver_never_sees_an_element_that_is_not_there_yet(start: int) -> None:
    """Whenever it looks, what the used ring's index covers is whole (2.7.8.2); it looks after each write, over some laps of
    the ring and over the end of the index.
    """
    driver = Driver(start)
    for index in range(ENTRIES):
        driver.describe(index, WRITE)
    driver.poke(USED + 4, f"<{2 * ENTRIES}I", *[0xEEEE_EEEE] * 2 * ENTRIES)
    seen: list[tuple[int, int]] = []
    driver.memory.watch = lambda: seen.extend(driver.collect())
    pushed = []
    for number in range(3 * ENTRIES + 1):
        # Not the head of the element that the ring had in this place before, nor its bytes.
        head = (number + number // ENTRIES) % ENTRIES
        driver.offer(head)
        chain = driver.queue.peek()
        assert chain is not None
        assert chain.head == head
        driver.queue.advance()
        assert driver.queue.state.last_avail == driver.offered
        assert seen == pushed, "nothing comes back before it is given back"
        driver.queue.push(head, 100 + number)
        pushed.append((head, 100 + number))
        assert seen == pushed
        assert driver.queue.state.used_index == driver.taken


def test_the_bytes_of_a_chain_are_there_before_it_comes_back() -> None:
    driver = Driver()
    driver.describe(0, WRITE | NEXT, 1)
    driver.describe(1, WRITE)
    driver.offer(0)
    data = bytes(range(1, 29))

    def look() -> None:
        for head, written in driver.collect():
            assert (head, written) == (0, len(data))
            assert driver.memory.data[BUFFERS : BUFFERS + len(data)] == data
            found.append(head)

    found: list[int] = []
    driver.memory.watch = look
    chain = driver.queue.peek()
    assert chain is not None
    driver.queue.advance()
    driver.queue.scatter(chain, data)
    assert not found
    driver.queue.push(chain.head, len(data))
    assert found == [0]
    assert not any(driver.memory.data[BUFFERS + len(data) : BUFFERS + 64])


@pytest.mark.parametrize("start", [0, 65533, 65535])
@pytest.mark.parametrize("taken", [0, 1, ENTRIES])
def test_a_driver_offers_no_more_than_the_ring_holds(start: int, taken: int) -> None:
    driver = Driver(start)
    for index in range(ENTRIES):
        driver.describe(index)
    for _ in range(taken):
        driver.offer(0)
        driver.queue.advance()
    for count in range(ENTRIES + 1):
        assert driver.queue.waiting() == count
        assert (driver.queue.peek() is None) is (count == 0)
        driver.offer(count % ENTRIES)
    # Every descriptor is good; the index alone is one too far.
    for refused in (driver.queue.waiting, driver.queue.peek):
        with pytest.raises(QueueError, match=f"the available ring of {ENTRIES} entries offers {ENTRIES + 1}"):
            refused()
    for too_far in (ENTRIES + 2, 0x8000, 0xFFFF):
        driver.poke(AVAIL + 2, "<H", driver.queue.state.last_avail + too_far & 0xFFFF)
        with pytest.raises(QueueError, match=f"offers {too_far}$"):
            driver.queue.peek()


def test_a_chain_has_no_more_descriptors_than_the_queue() -> None:
    driver = Driver()
    for index in range(ENTRIES):
        driver.describe(index, NEXT if index < ENTRIES - 1 else 0, index + 1)
    driver.offer(0)
    chain = driver.queue.peek()
    assert chain is not None
    assert [at for at, _ in chain.readable] == [BUFFERS + 16 * index for index in range(ENTRIES)]
    driver.describe(ENTRIES - 1, NEXT, 0)
    with pytest.raises(QueueError, match="does not end"):
        driver.queue.peek()
    # What is behind the table is no descriptor, good as it looks.
    driver.describe(ENTRIES)
    driver.describe(0, NEXT, ENTRIES)
    with pytest.raises(QueueError, match=f"descriptor {ENTRIES} is not one of {ENTRIES}"):
        driver.queue.peek()
    driver.offered = 0
    driver.offer(ENTRIES)
    with pytest.raises(QueueError, match=f"descriptor {ENTRIES} is not one of {ENTRIES}"):
        driver.queue.peek()


@pytest.mark.parametrize("used", [0, 65534])
def test_a_state_has_no_more_chains_taken_than_the_ring_holds(used: int) -> None:
    driver = Driver()
    driver.poke(USED + 2, "<H", used)

    def state(outstanding: int, num: int = ENTRIES, limit: int = 256) -> QueueState:
        return QueueState(limit, num, True, DESC, AVAIL, USED, last_avail=used + outstanding & 0xFFFF)

    for outstanding in (0, 1, ENTRIES):
        loaded = state(outstanding)
        driver.queue.check(loaded)
        assert loaded.used_index == used, "taken from RAM"
    for outstanding in (ENTRIES + 1, -1):
        with pytest.raises(QueueError, match=f"cannot be with {ENTRIES} entries"):
            driver.queue.check(state(outstanding))
    driver.queue.check(state(0, 256))
    for num, limit in ((512, 256), (256, 128), (3, 256)):
        with pytest.raises(QueueError, match=f"^{num} entries are no power of two up to {limit}$"):
            driver.queue.check(state(0, num, limit))
    with pytest.raises(QueueError, match="without entries"):
        driver.queue.check(state(0, 0))


def test_a_queue_that_is_not_ready_offers_nothing_and_is_not_looked_at() -> None:
    driver = Driver()
    driver.describe(0)
    driver.offer(0)
    driver.queue.state.ready = False
    driver.memory.data.clear()
    assert driver.queue.waiting() == 0
    assert driver.queue.peek() is None
    driver.queue.check(QueueState(256, 3, False, last_avail=7))
    driver.queue.state = QueueState(128, ENTRIES, True, 1, 2, 3, 4, 5)
    driver.queue.reset()
    assert driver.queue.state == QueueState(128, 0, False, 0, 0, 0, 0, 0)
    assert Virtqueue(64, driver.memory).state == QueueState(64, 0, False, 0, 0, 0, 0, 0)


def test_a_chain_is_read_first_and_written_then() -> None:
    driver = Driver()
    for index, flags in enumerate((NEXT, NEXT, NEXT | WRITE, WRITE)):
        driver.describe(index, flags, index + 1)
    driver.memory.data[BUFFERS : BUFFERS + 32] = bytes(range(32))
    driver.offer(0)
    chain = driver.queue.peek()
    assert chain is not None
    assert chain.readable == [(BUFFERS, 16), (BUFFERS + 16, 16)]
    assert chain.writable == [(BUFFERS + 32, 16), (BUFFERS + 48, 16)]
    assert (chain.readable_bytes, chain.writable_bytes) == (32, 32)
    assert driver.queue.gather(chain) == bytes(range(32))
    driver.queue.scatter(chain, bytes(range(100, 132)))
    assert driver.memory.data[BUFFERS + 32 : BUFFERS + 65] == bytes(range(100, 132)) + b"\0"
    driver.describe(3, 0)
    with pytest.raises(QueueError, match=r"^descriptor 3 is to be read and follows one to be written$"):
        driver.queue.peek()
    driver.describe(3, WRITE | INDIRECT)
    with pytest.raises(QueueError, match=r"^descriptor 3 is a table of others"):
        driver.queue.peek()


@pytest.mark.parametrize("flags", [0, 1, 2, 3])
def test_a_driver_may_want_no_interrupt(flags: int) -> None:
    driver = Driver()
    driver.poke(AVAIL, "<H", flags)
    driver.describe(0, WRITE)
    driver.offer(0)
    assert driver.queue.push(0, 1) is not bool(flags & 1)


@pytest.mark.parametrize("where", ["desc", "avail", "used"])
def test_a_table_may_end_with_ram_and_not_behind(where: str) -> None:
    """Descriptors, an available ring, a used ring: 16 bytes, 2 and 8 for each entry, rings with 4 before."""
    sizes = {"desc": 16 * ENTRIES, "avail": 4 + 2 * ENTRIES, "used": 4 + 8 * ENTRIES}
    told = {"desc": "the descriptor table", "avail": "the available ring", "used": "the used ring"}
    for beyond in (0, 1):
        driver = Driver(ENTRIES - 1)
        at = SIZE - sizes[where] + beyond
        setattr(driver.queue.state, where, at)
        # What a table says moves with it: the last entry, which is the last that the ring has.
        driver.describe(ENTRIES - 1, WRITE)
        driver.offer(ENTRIES - 1)
        tables = {"desc": DESC, "avail": AVAIL, "used": USED}
        driver.memory.data[at:] = driver.memory.data[tables[where] : tables[where] + SIZE - at]

        def use(driver: Driver = driver) -> None:
            chain = driver.queue.peek()
            assert chain is not None
            driver.queue.push(chain.head, 1)

        if beyond:
            with pytest.raises(QueueError, match=f"^{told[where]}: outside"):
                use()
        else:
            use()
    driver.queue.state.used = SIZE - 1
    with pytest.raises(QueueError, match=r"^the used ring: outside"):
        driver.queue.check(QueueState(256, ENTRIES, True, DESC, AVAIL, SIZE - 3))


def test_buffers_that_are_not_in_ram() -> None:
    driver = Driver()
    for flags in (0, WRITE):
        driver.poke(DESC, "<QIHH", SIZE - 15, 16, flags, 0)
        driver.offer(0)
        chain = driver.queue.peek()
        assert chain is not None
        driver.queue.advance()
        with pytest.raises(QueueError, match=r"^a buffer: outside"):
            driver.queue.scatter(chain, bytes(16)) if flags else driver.queue.gather(chain)
