"""Migrations with multifd between two sternas."""

import socket
import threading
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.jit.plain import plain
from tests.migration.pairs import TCP, Host, assert_one_runs, hosts, source_guest, waiting_guest
from tests.refusal import refuse_threads
from tests.stream import reference

from sterna.migration.errors import StateError
from sterna.migration.statistics import MigrationStatus
from sterna.stream.multifd import kernels
from sterna.testing.guest import DoubleGuest

COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED


def switch_on(*both: Host, channels: int = 2, compression: str = "none", **parameters: object) -> None:
    for host in both:
        host.controller.set_capabilities({"multifd": True})
        host.controller.set_parameters(
            {"multifd-channels": channels, "multifd-compression": compression, **parameters}
        )


# Slow enough that pages change between passes, and never so that all of the rest fits.
SLOW = {"max-bandwidth": 4 << 20, "downtime-limit": 0}


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("channels", [1, 2, 16])
def test_a_running_guest_moves(channels: int, compression: str) -> None:
    with hosts(source_guest(700, steps_per_harvest=350), waiting_guest(700)) as (here, there):
        switch_on(here, there, channels=channels, compression=compression)
        here.controller.set_parameters(SLOW)
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(4)
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert info.status is COMPLETED, info.error
        assert there.outcome().status is COMPLETED
        assert info.verified is True
        assert assert_one_runs(here.guest, there.guest) is there.guest
        assert 0 < info.multifd_bytes < info.transferred
        assert info.to_qmp()["ram"]["multifd-bytes"] == info.multifd_bytes


def test_over_unix_sockets_with_pages_of_1_kib(tmp_path: Path) -> None:
    guests = source_guest(300, steps_per_harvest=100), waiting_guest(300)
    for guest in guests:
        guest.page_bits = None  # as QEMU's vexpress-a15
    with hosts(*guests) as (here, there):
        switch_on(here, there, channels=3)
        here.controller.set_parameters(SLOW)
        here.controller.migrate(there.controller.incoming(f"unix:{tmp_path}/in"))
        here.wait_pass(3)
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert (info.status, info.verified) == (COMPLETED, True), info.error
        assert assert_one_runs(here.guest, there.guest) is there.guest


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_with_xbzrle(compression: str) -> None:
    """Changes go on the main channel, whole pages on the others."""
    with hosts(source_guest(700, steps_per_harvest=350), waiting_guest(700)) as (here, there):
        switch_on(here, there, channels=3, compression=compression)
        here.controller.set_capabilities({"xbzrle": True})
        here.controller.set_parameters({**SLOW, "xbzrle-cache-size": 1 << 20})
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(6)
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert (info.status, info.verified) == (COMPLETED, True), info.error
        assert assert_one_runs(here.guest, there.guest) is there.guest
        assert info.xbzrle is not None
        assert info.xbzrle.pages > 0, "some pages went as what changed"
        assert info.xbzrle.cache_miss > 0, "and some whole, because 700 pages do not fit 256 places"


def test_xbzrle_and_multifd_are_refused_to_a_qemu() -> None:
    guest = source_guest()
    with hosts(guest) as (here,), socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        switch_on(here)
        here.controller.set_capabilities({"xbzrle": True})
        here.controller.migrate(f"tcp:127.0.0.1:{listener.getsockname()[1]}")
        main, *_ = [stack.enter_context(listener.accept()[0]) for _ in range(3)]
        main.sendall(bytes.fromhex("0002 0004 53544e41"))  # PONG, and no HELLO before
        info = here.outcome()
        assert info.status is FAILED
        assert "multifd and xbzrle together need a sterna at the destination" in info.error
        assert info.pass_number == 0, "before any page was sent"
        assert guest.running


@pytest.mark.parametrize(
    ("here_on", "there_on", "complaint"),
    [
        (True, False, "destination refused: multifd is on at the source, but off here"),
        (False, True, "multifd is on here, but off at the source"),
        (4, 2, "destination refused: multifd"),
        (2, 4, "multifd-channels is 2 at the source, 4 here"),
    ],
)
def test_ends_that_do_not_agree_say_so(here_on: int, there_on: int, complaint: str) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        for host, on in ((here, here_on), (there, there_on)):
            if on:
                switch_on(host, channels=2 if on is True else on)
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is FAILED
        assert complaint in info.error
        there.wait_status(FAILED)
        assert "multifd" in there.outcome().error
        assert here.guest.running
        assert not here.guest.logging
        # They agree, and the next attempt succeeds.
        for host in (here, there):
            switch_on(host)
        info = here.migrate(there.controller.info().socket_address)
        assert info.status is COMPLETED, info.error
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_one_way_channels_are_refused(tmp_path: Path) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        switch_on(here, there)
        for uri in (f"file:{tmp_path}/stream", "exec:cat > /dev/null"):
            with pytest.raises(
                StateError, match=r"multifd is not supported by current protocol.*tcp: or unix:"
            ):
                here.controller.migrate(uri)
        assert here.guest.running
        (tmp_path / "stream").write_bytes(b"QEVM")
        there.controller.incoming(f"file:{tmp_path}/stream")
        assert "multifd is on here, and needs several connections" in there.outcome().error


def test_the_limit_holds_for_all_channels_together() -> None:
    limit = 16 << 20
    guest = DoubleGuest(2048, steps_per_ms=0)
    guest.block.data[:] = 1
    with hosts(guest, waiting_guest(2048)) as (here, there):
        switch_on(here, there, channels=8)
        here.controller.set_parameters({"max-bandwidth": limit})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is COMPLETED, info.error
        first = info.passes[0]
        assert first.bytes > 8 << 20
        # Half a second's worth: the share that may be caught up, and what each channel sends in one go, is in it.
        assert first.bytes / first.seconds < limit * 1.25


def test_a_migration_can_be_cancelled_and_repeated() -> None:
    with hosts(source_guest(400, steps_per_harvest=100), waiting_guest(400)) as (here, there):
        switch_on(here, there, channels=4)
        here.controller.set_parameters(SLOW)
        uri = there.controller.incoming(TCP)
        for count in (1, 2):
            here.events.clear()
            here.controller.migrate(uri)
            here.wait_pass(2)
            here.controller.cancel()
            assert here.outcome().status is MigrationStatus.CANCELLED
            there.wait_status(FAILED, count)
            assert here.guest.running
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.migrate(uri)
        assert (info.status, info.verified) == (COMPLETED, True), info.error
        assert assert_one_runs(here.guest, there.guest) is there.guest
        # The destination's end when its guest runs already; that they do is looked at after each test.
        names = [thread.name for thread in threading.enumerate()]
        assert not [name for name in names if name.startswith("multifd-send")]


# -- kernels -------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([10, 11, 12]), st.lists(st.integers(0, 31), min_size=1, max_size=40), st.integers(0, 99)
)
def test_kernels_and_reference_agree(bits: int, numbers: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)
    pages = np.array(numbers, dtype=np.int64)
    ram = np.zeros(32 << bits, dtype=np.uint8)
    for page in rng.integers(0, 32, 12):
        ram[(page << bits) + rng.integers(0, 1 << bits)] = rng.integers(1, 256)
    data = rng.integers(0, 256, len(numbers) << bits, dtype=np.uint8)
    results = []
    for split_zero, gather_pages, as_is in (
        (kernels.split_zero, kernels.gather_pages, lambda kernel: kernel),
        (plain(kernels.split_zero), plain(kernels.gather_pages), plain),
        (reference.split_zero, reference.gather_pages, plain),
    ):
        zero, whole = np.zeros_like(pages), np.zeros_like(pages)
        zeros = split_zero(ram.view(np.uint64), pages, bits, zero, whole)
        vectors = np.zeros((pages.size, 2), dtype=np.uint64)
        rows = gather_pages(pages, 1 << 40, bits, vectors[:0], vectors, 0)
        bitmap = np.zeros(1, dtype=np.uint64)
        as_is(kernels.mark)(bitmap, pages)
        target = ram.copy()
        as_is(kernels.place)(data, pages, bits, target)
        results.append((zeros, zero[:zeros].tolist(), whole[: pages.size - zeros].tolist()))
        results[-1] += (vectors[:rows].tolist(), bitmap.tolist(), target.tobytes())
    assert results[0] == results[1] == results[2]
    zeros, zero_pages, whole_pages, gather, words, _ = results[0]
    assert sorted(zero_pages + whole_pages) == sorted(numbers)
    assert all(not ram[page << bits :][: 1 << bits].any() for page in zero_pages)
    assert sum(size for _, size in gather) == len(numbers) << bits
    covered = [at for address, size in gather for at in range(address, address + size, 1 << bits)]
    assert covered == [(1 << 40) + (page << bits) for page in numbers]
    assert words[0] == sum(1 << page for page in set(numbers))


@pytest.mark.parametrize("end", ["send", "receive-1"])
def test_a_channel_without_a_thread_fails_the_migration_at_once(
    end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_threads(monkeypatch, f"multifd-{end}", times=1)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        switch_on(here, there)
        address = there.controller.incoming(TCP)
        info = here.migrate(address)
        assert info.status is FAILED
        assert "can't start new thread" in info.error
        assert assert_one_runs(here.guest, there.guest) is here.guest
        assert here.migrate(address).status is COMPLETED
        assert assert_one_runs(here.guest, there.guest) is there.guest
