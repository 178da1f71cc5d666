"""The XBZRLE cache, and migrations with it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.hosttree import HostTree, host
from tests.jit.plain import plain
from tests.migration.pairs import TCP, Host, assert_one_runs, hosts, source_guest, waiting_guest
from tests.stream import reference

from sterna.memory.bitmap import DirtyBatch, full_bitmap, new_bitmap, set_bits
from sterna.memory.digest import populated_chunks
from sterna.memory.ram import RamBlock, RamError
from sterna.migration.statistics import MigrationStatus
from sterna.migration.transport.work import PassWork
from sterna.stream.ram import records
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.encoder import Batch, encode_pages
from sterna.stream.ram.setup import END_OF_RECORDS
from sterna.stream.reader import StreamReader
from sterna.stream.xbzrle import changes
from sterna.stream.xbzrle.cache import EncodedBatch, XbzrleCache, affordable_cache
from sterna.testing.guest import DoubleGuest

__all__ = ["host"]

PAGES = 16


class Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data

    def readinto(self, buffer: memoryview, /) -> int:
        piece, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


class Pair:
    """Two blocks of RAM, and the records that keep the second as the first."""

    def __init__(self, cache_pages: int = PAGES, page_bits: int = 12, from_start: bool = False) -> None:
        self.source, self.target = RamBlock("a", PAGES * 4096), RamBlock("a", PAGES * 4096)
        self.source.data[:] = np.random.default_rng(2).integers(1, 256, self.source.size, dtype=np.uint8)
        self.cache = XbzrleCache(
            [RamBlock("before", 3 * 4096), self.source], cache_pages << 12, page_bits, from_start=from_start
        )
        self.decoder = RamDecoder([self.target], page_bits)
        pages = encode_pages(
            self.source, np.arange(PAGES, dtype=np.int64), suffix=END_OF_RECORDS, page_bits=page_bits
        )
        self.decoder.read_records(StreamReader(Bytes(pages.tobytes())))
        self.number = 1

    def send(self, *pages: int, keep: bool = True, new_pass: bool = True) -> EncodedBatch:
        self.number += new_pass
        numbers = np.array(pages, dtype=np.int64)
        sent = self.cache.encode(Batch(self.source, numbers), self.number, suffix=END_OF_RECORDS, keep=keep)
        # While the system call reads the pages the guest writes on: kept pages must not change under it.
        wire = b"".join(records.bytes_at(int(address), int(size)) for address, size in sent.iov)
        assert len(wire) == sent.nbytes
        self.decoder.read_records(StreamReader(Bytes(wire)))
        return sent

    def page(self, number: int) -> "np.ndarray[tuple[int], np.dtype[np.uint8]]":
        return self.source.data[number * 4096 : (number + 1) * 4096]

    def check(self) -> None:
        np.testing.assert_array_equal(self.source.data, self.target.data)


def kinds(sent: EncodedBatch) -> tuple[int, int, int]:
    return sent.normal, sent.zero, sent.saved


def test_a_page_enters_whole_and_then_goes_as_its_changes() -> None:
    pair = Pair()
    pair.page(3)[7] ^= 1
    assert kinds(pair.send(3)) == (1, 0, 0)
    pair.page(3)[[7, 4095]] ^= 9
    sent = pair.send(3)
    assert kinds(sent) == (0, 0, 1)
    # Word, name, encoding and length, two pairs of lengths and a byte, the end of the part.
    assert sent.nbytes == 8 + 2 + 3 + (1 + 1 + 1) + (2 + 1 + 1) + 8
    pair.check()
    sent = pair.send(3)
    assert (kinds(sent), sent.nbytes) == ((0, 0, 1), 8), "nothing changed, nothing is sent"
    statistics = pair.cache.finish_pass()
    assert (statistics.pages, statistics.cache_miss, statistics.overflow) == (2, 1, 0)
    assert statistics.bytes == 2 + 3 + 3 + 4
    assert statistics.encoding_rate == pytest.approx(2 * 4096 / statistics.bytes)
    assert statistics.cache_miss_rate == pytest.approx(1 / 3)


def test_the_first_record_that_is_sent_names_the_block() -> None:
    pair = Pair()
    pair.send(1, 2, 3)
    pair.page(2)[0] ^= 1
    pair.page(3)[0] ^= 1
    sent = pair.send(1, 2, 3)
    assert kinds(sent) == (0, 0, 3)
    assert sent.nbytes == 2 * (8 + 3 + 3) + 2 + 8
    pair.check()


def test_zero_pages_stay_zero_records_and_change_from_zero() -> None:
    pair = Pair()
    pair.send(4)
    pair.page(4)[:] = 0
    pair.page(5)[:] = 0
    assert kinds(pair.send(4, 5)) == (0, 2, 0)
    pair.check()
    pair.page(4)[100] = 1
    pair.page(5)[100] = 1
    assert kinds(pair.send(4, 5)) == (0, 0, 2)
    pair.check()


def test_a_page_that_changed_all_over_goes_whole_and_is_kept() -> None:
    pair = Pair()
    pair.send(6)
    pair.page(6)[:] ^= 0xFF
    assert kinds(pair.send(6)) == (1, 0, 0)
    pair.check()
    pair.page(6)[9] ^= 1
    assert kinds(pair.send(6)) == (0, 0, 1)
    pair.check()
    assert pair.cache.finish_pass().overflow == 1


def test_a_page_sent_whole_is_sent_as_it_is_kept() -> None:
    """The guest writes between the look at a page and the system call: the peer gets what the cache holds."""
    pair = Pair()
    sent = pair.cache.encode(Batch(pair.source, np.array([8])), 2, suffix=END_OF_RECORDS)
    before = pair.page(8).copy()
    pair.page(8)[:] = 1
    wire = b"".join(records.bytes_at(int(address), int(size)) for address, size in sent.iov)
    assert before.tobytes() in wire
    pair.decoder.read_records(StreamReader(Bytes(wire)))
    pair.number = 2
    pair.send(8)
    pair.check()


def test_pages_share_a_place_and_the_one_in_use_stays() -> None:
    pair = Pair(cache_pages=4)
    pair.send(1)
    pair.page(5)[0] ^= 1
    assert kinds(pair.send(5)) == (1, 0, 0)
    pair.page(1)[0] ^= 1
    assert kinds(pair.send(1)) == (0, 0, 1), "page 5 did not displace it"
    assert kinds(pair.send(5)) == (1, 0, 0), "page 1 was used in the last pass"
    assert kinds(pair.send(5)) == (1, 0, 0), "but not in the one before: page 5 enters"
    pair.page(1)[0] ^= 2
    pair.page(5)[0] ^= 2
    assert kinds(pair.send(1, 5)) == (1, 0, 1)
    pair.check()


def test_the_last_pass_leaves_the_cache_alone() -> None:
    pair = Pair()
    pair.send(1)
    pair.page(1)[5] ^= 1
    first = pair.send(1, keep=False).nbytes
    pair.page(1)[5] ^= 3
    assert pair.send(1, keep=False).nbytes == first
    pair.page(2)[5] ^= 1
    assert kinds(pair.send(2, keep=False)) == kinds(pair.send(2, keep=False)) == (1, 0, 0)
    pair.check()


def test_what_the_rest_will_cost_is_what_it_does_cost() -> None:
    pair = Pair()
    everything = PassWork([(pair.source, full_bitmap(PAGES))])
    assert pair.cache.rest_bytes(PassWork([])) == 0
    assert pair.cache.rest_bytes(everything) == pytest.approx(PAGES * 4104, abs=10)
    pair.send(*range(8))
    pair.source.data[::4096] ^= 1
    before = [pair.cache._places.tolist(), pair.cache._counts.tolist()]
    expected = pair.cache.rest_bytes(everything)
    assert [pair.cache._places.tolist(), pair.cache._counts.tolist()] == before
    assert expected == pytest.approx(8 * (8 + 3 + 3) + 8 * 4104, abs=10)
    assert pair.send(*range(PAGES)).nbytes == pytest.approx(expected, abs=10)
    pair.check()


def test_sparse_pages_go_as_what_differs_from_zeros() -> None:
    pair = Pair(from_start=True)
    pair.page(3)[:] = 0
    pair.page(3)[[9, 4000]] = 1
    sent = pair.send(3)
    assert kinds(sent) == (0, 0, 1)
    # A zero record, then a change: word, encoding and length, two pairs of lengths and a byte.
    assert sent.nbytes == (8 + 2 + 1) + (8 + 3 + (1 + 1 + 1) + (2 + 1 + 1)) + 8
    pair.check()
    pair.page(3)[2000] = 7
    assert pair.send(3).nbytes == 8 + 2 + 3 + (2 + 1 + 1) + 8, "it is in the cache"
    pair.check()
    assert kinds(pair.send(4)) == (1, 0, 0), "a dense page goes whole"
    pair.page(5)[:3000] = 0
    assert pair.send(5).nbytes < 1200
    pair.page(6)[:2040] = 0
    assert kinds(pair.send(6)) == (1, 0, 0), "and so does one whose code is not much shorter than it is"
    pair.check()


def test_a_page_known_to_be_zero_takes_no_memory() -> None:
    with RamBlock("a", 64 << 20) as block:
        cache = XbzrleCache([block], 64 << 20, from_start=True)
        for first in range(0, block.pages, 512):
            cache.encode(Batch(block, np.arange(first, first + 512)), 1)
        assert not populated_chunks(cache._memory).any()
        block.data[5 << 20] = 1
        changed = np.array([5 << 8])
        assert cache.encode(Batch(block, changed), 2).nbytes < 40
        block.data[(5 << 20) + 1] = 1
        assert cache.encode(Batch(block, changed), 3).nbytes < 40
        block.data[5 << 20 : 6 << 20] = 0
        assert cache.encode(Batch(block, changed), 4).zero == 1
        block.data[(5 << 20) + 2] = 1
        assert cache.encode(Batch(block, changed), 5).nbytes < 40
        assert not populated_chunks(cache._memory).any(), "nor does one that is hardly more"
        block.data[5 << 20 : (5 << 20) + 100] = np.arange(1, 101)
        assert cache.encode(Batch(block, changed), 6).saved == 1
        assert populated_chunks(cache._memory).sum() == 1
        cache.close()


def test_the_host_is_asked_for_no_more_than_it_can_spare(host: HostTree) -> None:
    with RamBlock("a", 5 << 20) as small, RamBlock("b", 60 << 20) as large:
        assert affordable_cache([small]) == 8 << 20
        host.unified("/vm")
        host.group("vm", memory__max=100 << 20, memory__current=20 << 20)
        assert affordable_cache([small]) == 8 << 20
        assert affordable_cache([large]) == 8 << 20, (
            "half of the 20 MiB that are left when the guest has touched its 60"
        )
        large.data[:] = 1
        assert affordable_cache([large]) == 32 << 20
        assert affordable_cache([large], 20 << 20) == 16 << 20, "half of 60"
        assert affordable_cache([large], 90 << 20) == 0
        host.group("vm", memory__current=99 << 20)
        assert affordable_cache([small]) == 0
        (host.root / "proc/meminfo").unlink()
        host.unified("/other")
        assert affordable_cache([small]) == 0


def test_a_cache_for_which_there_is_no_memory_is_refused(host: HostTree) -> None:
    host.unified("/vm")
    host.group("vm", memory__max=100 << 20, memory__current=96 << 20)
    with RamBlock("a", 5 << 20) as block:
        with pytest.raises(
            RamError,
            match=r"the XBZRLE cache \(xbzrle-cache-size\) may take 5\.0 MiB of memory, and only 4\.0 MiB are left here",
        ):
            XbzrleCache([block], 1 << 60)
        XbzrleCache([block], 4 << 20).close()


def test_a_cache_larger_than_ram_takes_no_more_than_ram() -> None:
    with RamBlock("a", 5 << 20) as block:
        cache = XbzrleCache([block], 1 << 60)
        assert cache.statistics.cache_size == 1 << 60
        assert cache._memory.size == 8 << 20
        cache.close()


@pytest.mark.slow
@pytest.mark.parametrize("from_start", [False, True])
@pytest.mark.parametrize("page_bits", [10, 12])
@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(
            st.tuples(
                st.integers(0, PAGES - 1), st.integers(0, 4095), st.integers(0, 300), st.integers(0, 255)
            ),
            max_size=12,
        ),
        max_size=6,
    ),
    st.sampled_from([1, 4, 16, 64]),
)
def test_ram_follows_whatever_the_guest_writes(
    page_bits: int, from_start: bool, passes: list[list[tuple[int, int, int, int]]], cache_pages: int
) -> None:
    pair = Pair(cache_pages, page_bits, from_start)
    for number, writes in enumerate(passes):
        for page, at, size, value in writes:
            if value == 0:
                pair.page(page)[:] = 0
            else:
                pair.page(page)[at : at + size] ^= value
        dirty = sorted({page for page, *_ in writes})
        if number % 2:
            words = new_bitmap(PAGES)
            set_bits(words, np.array(dirty, dtype=np.uint64))
            pair.cache.rest_bytes(PassWork([(pair.source, words)]))
        pair.send(*dirty, keep=number < len(passes) - 1)
        pair.cache.finish_pass()
        pair.check()


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_kernel_and_reference_agree(data: st.DataObject) -> None:
    compiled = changes.encode_changes
    with pytest.MonkeyPatch.context() as patch:
        from_start = data.draw(st.booleans())
        pairs = [Pair(4, from_start=from_start) for _ in range(3)]
        for number in range(4):
            seed = data.draw(st.integers(0, 99))
            dirty = sorted(data.draw(st.sets(st.integers(0, PAGES - 1), max_size=9)))
            keep = number < 3 or data.draw(st.booleans())
            outcomes = []
            for pair, kernel in zip(
                pairs, (compiled, plain(compiled), reference.encode_changes), strict=True
            ):
                patch.setattr("sterna.stream.xbzrle.cache.changes.encode_changes", kernel)
                rng = np.random.default_rng(seed)
                for page in dirty:
                    at = rng.integers(0, 4096, rng.choice([0, 1, 9, 3000]))
                    pair.page(page)[at] = rng.integers(0, 256, at.size)
                    if rng.integers(0, 5) == 0:
                        pair.page(page)[:] = 0
                    if rng.integers(0, 3) == 0:
                        pair.page(page)[rng.integers(0, 4096, 5)[0] :] = 0
                sent = pair.send(*dirty, keep=keep)
                pair.check()
                cache = pair.cache
                outcomes.append((kinds(sent), sent.nbytes, sent.iov[:, 1].tolist(), cache._places.tolist()))
                outcomes[-1] += (cache._counts.tolist(), cache._memory.data.tobytes())
                outcomes[-1] += (cache._codes.tolist(),)
            assert outcomes[0] == outcomes[1] == outcomes[2]


def switch_on(host: Host, **parameters: object) -> None:
    host.controller.set_capabilities({"xbzrle": True})
    host.controller.set_parameters({"xbzrle-cache-size": 1 << 20, **parameters})


# Slow enough that pages change between passes, and never so that all of the rest fits.
QEMU_RULES = {"x-sterna-policy": "fixed"}
SLOW = {"max-bandwidth": 4 << 20, "downtime-limit": 0}


def test_a_running_guest_moves_with_xbzrle() -> None:
    with hosts(source_guest(200, steps_per_harvest=200), waiting_guest(200)) as (here, there):
        switch_on(here, **SLOW)
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(5)
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert there.outcome().status is MigrationStatus.COMPLETED
        assert info.verified is True
        assert assert_one_runs(here.guest, there.guest) is there.guest
        assert info.xbzrle is not None
        assert info.xbzrle.pages > 200
        assert info.xbzrle.cache_miss <= 200
        assert 0 < info.xbzrle.bytes < info.xbzrle.pages * 64
        answer = info.to_qmp()
        assert list(answer["xbzrle-cache"]) == [
            "cache-size",
            "bytes",
            "pages",
            "cache-miss",
            "cache-miss-rate",
            "encoding-rate",
            "overflow",
        ]
        assert answer["xbzrle-cache"]["cache-size"] == 1 << 20
        assert sum(record.pages for record in info.passes) >= info.xbzrle.pages + info.normal_pages
        # The estimate follows what changes take: pages of 4096 bytes would never have fitted.
        assert info.normal_pages <= 200 + info.xbzrle.cache_miss


@pytest.mark.parametrize("why", ["the user says no", "QEMU's rules"])
def test_without_the_capability_there_are_no_xbzrle_numbers(why: str) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        if why == "the user says no":
            here.controller.set_capabilities({"xbzrle": False})
        else:
            here.controller.set_parameters({"x-sterna-policy": "fixed"})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.xbzrle is None
        assert "xbzrle-cache" not in info.to_qmp()


def test_the_policy_chooses_encoding_from_the_start() -> None:
    """A guest with little on each page: all of it becomes a fraction, in pass 1 too."""
    guest = DoubleGuest(400, steps_per_ms=0)
    guest.advance_steps(800)
    with hosts(guest, waiting_guest(400)) as (here, there):
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.verified is True
        assert info.xbzrle is not None
        assert info.normal_pages == 0
        assert info.transferred < 400 * 100 + 10_000
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_encoding_that_costs_more_than_it_saves_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sterna.migration.policies.adaptive._is_encoding_worth_it", lambda situation: False)
    with hosts(source_guest(200, steps_per_harvest=200), waiting_guest(200)) as (here, there):
        here.controller.set_parameters(SLOW)
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(4)
        number = 5
        while not here.controller.info().normal_pages:
            here.wait_pass(number)
            number += 1
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_small_changes_converge_where_whole_pages_would_not() -> None:
    """The guest dirties all of its pages in every pass; as changes they fit the downtime limit."""
    with hosts(source_guest(400, steps_per_harvest=400), waiting_guest(400)) as (here, there):
        switch_on(here, **{"max-bandwidth": 40_000, "downtime-limit": 60, "xbzrle-cache-size": 2 << 20})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.passes[-2].dirty_pages * 4096 > 0.06 * 40_000, "more than fits as whole pages"
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_a_cancelled_migration_and_the_next_one_begin_with_an_empty_cache() -> None:
    with hosts(source_guest(200, steps_per_harvest=200), waiting_guest(200), waiting_guest(200)) as (
        here,
        there,
        elsewhere,
    ):
        switch_on(here, **SLOW, **QEMU_RULES)
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(4)
        here.controller.cancel()
        info = here.outcome()
        assert info.status is MigrationStatus.CANCELLED
        assert info.xbzrle is not None
        assert info.xbzrle.pages > 0
        assert here.guest.running
        assert not here.guest.logging
        here.guest.step_until(here.guest.steps + 1000)
        here.events.clear()
        harvest, at_looks = here.guest.harvest, []

        def noted_harvest() -> list[DirtyBatch]:
            at_looks.append(here.controller.info().xbzrle)
            return harvest()

        here.guest.harvest = noted_harvest  # type: ignore[method-assign]
        here.controller.migrate(elsewhere.controller.incoming(TCP))
        here.wait_pass(4)
        early = at_looks[1]  # of pass 1 alone: the second look ends pass 2
        assert early is not None
        assert early.pages == early.cache_miss == 0
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert info.verified is True
        assert assert_one_runs(here.guest, elsewhere.guest) is elsewhere.guest


def test_a_host_without_the_memory_fails_the_migration_and_not_the_guest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    guest: DoubleGuest = source_guest()
    with hosts(guest, waiting_guest()) as (here, there):
        switch_on(here)
        uri = there.controller.incoming(TCP)
        monkeypatch.setattr("sterna.memory.ram.mmap.mmap", _refuse)
        info = here.migrate(uri)
        monkeypatch.undo()
        assert info.status is MigrationStatus.FAILED
        assert "RAM block 'xbzrle cache'" in info.error
        assert guest.running
        assert not guest.logging


def _refuse(*_: object, **__: object) -> None:
    raise OSError(12, "Cannot allocate memory")
