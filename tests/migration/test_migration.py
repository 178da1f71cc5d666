"""Whole migrations between two guests, and what becomes of them when something goes wrong."""

import socket
import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from tests.migration.pairs import ANYWHERE, TCP, TIMEOUT, assert_one_runs, hosts, source_guest, waiting_guest
from tests.ports import held_port

from sterna.hypervisor.traits import Rule, Trait
from sterna.memory.bitmap import DirtyBatch
from sterna.migration import handshake
from sterna.migration.errors import ChannelError, MigrationError, StateError, UriError
from sterna.migration.statistics import MigrationStatus
from sterna.migration.transport.ratelimit import RateLimiter
from sterna.ownership import Ownership, OwnershipState
from sterna.testing.guest import DoubleGuest

COMPLETED, CANCELLED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.CANCELLED, MigrationStatus.FAILED


@pytest.mark.parametrize("uri", [TCP, "unix:{}/sock"])
def test_a_running_guest_moves(uri: str, tmp_path: Path) -> None:
    with hosts(source_guest(2000, steps_per_ms=5), waiting_guest(2000)) as (here, there):
        there.controller.set_parameters({})
        address = there.controller.incoming(uri.format(tmp_path))
        info = here.migrate(address)
        assert info.status is COMPLETED, info.error
        there.wait_status(COMPLETED)
        assert here.guest.away
        assert assert_one_runs(here.guest, there.guest) is there.guest
        assert here.statuses == ["setup", "active", "device", "completed"]
        assert there.statuses == ["setup", "active", "completed"]
        passes = [data["pass"] for name, data in here.events if name == "MIGRATION_PASS"]
        assert passes == list(range(1, len(info.passes) + 1))
        assert info.verified is True
        assert info.ram_digest_source == info.ram_digest_destination != ""
        assert info.passes[0].pages == 2000
        pages = info.normal_pages + info.zero_pages + info.saved_pages
        assert sum(record.pages for record in info.passes) == pages
        assert info.remaining == 0
        assert info.transferred > sum(record.bytes for record in info.passes)


def test_the_downtime_is_what_the_guests_counter_sees() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        times: list[int] = []
        announce, resume = there.guest.announce, there.guest.resume

        def timed_announce(delays: Sequence[float]) -> None:
            announce(delays)
            times.append(time.time_ns())

        def timed_resume() -> int:
            times.append(resume())
            return times[-1]

        there.guest.announce = timed_announce  # type: ignore[method-assign]
        there.guest.resume = timed_resume  # type: ignore[method-assign]
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is COMPLETED
        assert info.downtime_ms == pytest.approx(info.downtime_parts.total)
        assert there.guest.advanced_ns is not None
        gap_ms = there.guest.advanced_ns / 1e6
        # The counter moves after all else and just before the first instruction, so it sees all of the downtime but that
        # moment.
        assert gap_ms <= info.downtime_ms < gap_ms + (times[1] - times[0]) / 1e6
        assert info.clock_note == ""
        answer = info.to_qmp()
        assert answer["status"] == "completed"
        assert answer["downtime"] == round(info.downtime_ms)
        assert answer["ram"]["dirty-sync-count"] == len(info.passes)
        assert answer["x-sterna"]["verified"] is True


@pytest.mark.parametrize("note", ["late\nVERIFIED\x1b[2J", "late " * 1000])
def test_what_a_destination_says_of_the_clocks_is_one_line(
    note: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshake, "clamp_elapsed", lambda elapsed_ns, longest_ns: (0, note))
    with hosts(source_guest(), waiting_guest()) as (here, there):
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is COMPLETED, info.error
        assert info.clock_note.startswith("late ")
        assert info.clock_note.isprintable()
        assert len(info.clock_note) <= 400


def test_a_paused_guest_arrives_paused() -> None:
    guest = DoubleGuest(16, running=False)
    guest.ownership = Ownership(OwnershipState.OWNER)
    guest.advance_steps(50)
    with hosts(guest, waiting_guest(16)) as (here, there):
        assert here.migrate(there.controller.incoming(TCP)).status is COMPLETED
        assert there.outcome().status is COMPLETED
        assert not there.guest.running
        assert not guest.running
        there.guest.check_ram()


def test_a_guest_wanders_from_a_to_b_to_c_to_a() -> None:
    with hosts(source_guest(), waiting_guest(), waiting_guest()) as chain:
        for here, there in pairwise(chain):
            assert here.migrate(there.controller.incoming(TCP)).status is COMPLETED
            assert there.controller.incoming_info().verified is True
            assert_one_runs(here.guest, there.guest)
        with hosts(waiting_guest()) as (home,):
            assert chain[-1].migrate(home.controller.incoming(TCP)).status is COMPLETED
            assert_one_runs(chain[-1].guest, home.guest)


def test_a_file_is_written_and_read(tmp_path: Path) -> None:
    uri = f"file:{tmp_path}/stream"
    with hosts(source_guest(), waiting_guest()) as (here, there):
        here.controller.set_parameters({"x-sterna-verify": "on"})
        info = here.migrate(uri)
        assert info.status is COMPLETED, info.error
        assert info.verified is None
        assert here.guest.away
        there.controller.incoming(uri)
        assert there.outcome().status is COMPLETED, there.outcome().error
        assert there.outcome().verified is True
        assert there.outcome().ram_digest_destination == info.ram_digest_source
        there.guest.check_ram()


def test_one_way_streams_carry_nothing_of_ours_unless_asked(tmp_path: Path) -> None:
    with hosts(source_guest()) as (here,):
        assert here.migrate(f"file:{tmp_path}/stream").status is COMPLETED
    assert b"sterna" not in (tmp_path / "stream").read_bytes()


def test_a_command_carries_the_stream(tmp_path: Path) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        assert here.migrate(f"exec:gzip -1 > {tmp_path}/stream.gz").status is COMPLETED
        there.controller.incoming(f"exec:gzip -dc < {tmp_path}/stream.gz")
        assert there.outcome().status is COMPLETED, there.outcome().error
        there.guest.check_ram()
        assert there.guest.running
    for thread in threading.enumerate():
        if thread.name == "exec-exit":  # a command that has sent all of it may end later
            thread.join(TIMEOUT)


def test_a_command_that_fails_before_the_end_leaves_the_guest_here() -> None:
    with hosts(source_guest()) as (here,):
        info = here.migrate("exec:head -c 100 > /dev/null; exit 7")
        assert (info.status, info.in_doubt) == (FAILED, False)
        assert here.guest.running
        assert not here.guest.logging


def test_inherited_sockets_negotiate_as_others_do() -> None:
    a, b = socket.socketpair()
    with a, b, hosts(source_guest(), waiting_guest()) as (here, there):
        there.controller.incoming(f"fd:{b.fileno()}")
        b.close()
        info = here.migrate(f"fd:{a.fileno()}")
        assert (info.status, info.verified) == (COMPLETED, True)
        assert_one_runs(here.guest, there.guest)


def test_defer_waits_for_a_uri() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        assert there.controller.incoming("defer") == "defer"
        with pytest.raises(StateError, match="waiting for an incoming migration"):
            there.controller.migrate(ANYWHERE)
        address = there.controller.incoming(TCP)
        with pytest.raises(StateError, match="started already"):
            there.controller.incoming(TCP)
        assert there.controller.info().to_qmp()["socket-address"][0]["port"] == address.rpartition(":")[2]
        assert here.migrate(address).status is COMPLETED


def test_calls_that_do_not_fit_are_refused() -> None:
    with hosts(source_guest(2000)) as (here,), socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(UriError):
            here.controller.migrate("tcp:nowhere")
        with pytest.raises(StateError, match="postcopy"):
            here.controller.migrate(ANYWHERE, resume=True)
        assert here.controller.info().to_qmp() == {}
        here.controller.migrate(f"tcp:127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(StateError, match="in progress"):
            here.controller.migrate(ANYWHERE)
        with pytest.raises(StateError, match="in progress"):
            here.controller.set_capabilities({"events": False})
        here.controller.cancel()
        assert here.outcome().status is CANCELLED
    with pytest.raises(MigrationError, match="has been closed"):
        here.controller.migrate(ANYWHERE)


# -- failures ------------------------------------------------------------------------------------------------


def test_nobody_there() -> None:
    with held_port() as port, hosts(source_guest()) as (here,):
        uri = f"tcp:127.0.0.1:{port}"
        info = here.migrate(uri)
        assert (info.status, info.error) == (FAILED, f"connection refused by {uri}: nobody listens there")
        assert here.guest.running
        assert here.guest.logging_started == 0
        assert here.statuses == ["setup", "failed"]


def test_a_taken_port_is_reported_at_once() -> None:
    with (
        hosts(waiting_guest()) as (there,),
        socket.create_server(("127.0.0.1", 0)) as server,
        pytest.raises(ChannelError, match="address already in use"),
    ):
        there.controller.incoming(f"tcp:127.0.0.1:{server.getsockname()[1]}")


@pytest.mark.parametrize("call", ["start_dirty_logging", "harvest", "stop_for_migration", "save_devices"])
def test_whatever_fails_at_the_source_it_keeps_the_guest(call: str) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        here.guest.fail[call] = RuntimeError("no such luck")
        info = here.migrate(address)
        assert (info.status, info.error) == (FAILED, "internal error: RuntimeError: no such luck")
        there.wait_status(FAILED)
        assert assert_one_runs(here.guest, there.guest) is here.guest
        here.guest.fail.clear()
        assert here.migrate(address).status is COMPLETED
        assert_one_runs(here.guest, there.guest)


@pytest.mark.parametrize("call", ["load_devices", "resume"])
def test_a_destination_that_refuses_says_why(call: str) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        there.guest.fail[call] = RuntimeError("the cupboard is full")
        info = here.migrate(address)
        assert info.status is FAILED
        assert info.error == "destination refused: internal error: RuntimeError: the cupboard is full"
        there.wait_status(FAILED)
        assert assert_one_runs(here.guest, there.guest) is here.guest
        assert not there.guest.block.data.any(), "a failed attempt leaves no memory behind"
        there.guest.fail.clear()
        assert here.migrate(address).status is COMPLETED
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_machines_that_differ_are_refused() -> None:
    with hosts(source_guest(64), waiting_guest(32)) as (here, there):
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is FAILED
        assert info.error.startswith("destination refused: section 'ram'")
        assert "Size mismatch: double.ram: 0x40000 != 0x20000" in info.error
        assert here.guest.running
    other = waiting_guest()
    other.machine_type = "double-2.0"
    with hosts(source_guest(), other) as (here, there):
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is FAILED
        there.wait_status(FAILED)
        text = "section 'configuration': Machine type received is 'double-1.0' and local is 'double-2.0'"
        assert there.controller.info().error == text
        assert info.error == f"destination refused: {text}"
        assert here.guest.running


def test_verification_can_be_off_and_must_be_possible_when_on() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        there.controller.set_parameters({"x-sterna-verify": "off"})
        here.controller.set_parameters({"x-sterna-verify": "on"})
        info = here.migrate(address)
        assert (info.status, info.error) == (FAILED, "x-sterna-verify is on here, but off at the destination")
        there.wait_status(FAILED)
        here.controller.set_parameters({"x-sterna-verify": "auto"})
        info = here.migrate(address)
        assert (info.status, info.verified) == (COMPLETED, None)
        assert_one_runs(here.guest, there.guest)


def test_a_lost_dirty_bit_is_found_and_located() -> None:
    guest = source_guest(2000, steps_per_ms=100, steps_per_harvest=100)
    guest.lose_write_at = 1234
    with hosts(guest, waiting_guest(2000)) as (here, there):
        here.controller.set_parameters({"max-bandwidth": 40_000_000, "downtime-limit": 0})
        address = there.controller.incoming(TCP)
        here.controller.migrate(address)
        here.wait_pass(2)
        # The page is written after pass 1, and the log does not say so.
        guest.step_until(guest.steps + 2000)
        here.controller.set_parameters({"downtime-limit": 1000})
        info = here.outcome()
        assert info.status is FAILED
        assert "RAM block 'double.ram', page 1234 (last sent in pass 1)" in info.error
        assert info.verified is False
        there.wait_status(FAILED)
        assert assert_one_runs(here.guest, there.guest) is here.guest
        guest.lose_write_at = None
        here.controller.set_parameters({"max-bandwidth": 0})
        assert here.migrate(address).status is COMPLETED


# -- cancelling ----------------------------------------------------------------------------------------------


def cancel_and_migrate_again(here, there, address) -> None:  # type: ignore[no-untyped-def]
    here.controller.cancel()
    assert here.outcome().status is CANCELLED, here.outcome()
    assert here.statuses[-2:] == ["cancelling", "cancelled"]
    assert here.guest.running
    assert not here.guest.logging
    if there is not None:
        there.wait_status(FAILED)
        assert assert_one_runs(here.guest, there.guest) is here.guest
        here.controller.set_parameters({"max-bandwidth": 0, "downtime-limit": 300})
        assert here.migrate(address).status is COMPLETED, here.outcome().error
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_cancel_in_setup() -> None:
    with hosts(source_guest()) as (here,), socket.create_server(("127.0.0.1", 0)) as silent:
        here.controller.migrate(f"tcp:127.0.0.1:{silent.getsockname()[1]}")
        here.wait_status(MigrationStatus.SETUP)
        cancel_and_migrate_again(here, None, "")


@pytest.mark.parametrize("number", [1, 2, 3])
def test_cancel_in_any_pass(number: int) -> None:
    with hosts(source_guest(2000, steps_per_ms=200, steps_per_harvest=100), waiting_guest(2000)) as (
        here,
        there,
    ):
        here.controller.set_parameters({"max-bandwidth": 60_000_000, "downtime-limit": 0})
        address = there.controller.incoming(TCP)
        here.controller.migrate(address)
        here.wait_pass(number)
        cancel_and_migrate_again(here, there, address)


@pytest.mark.parametrize("call", ["stop_for_migration", "save_devices", "harvest"])
def test_cancel_during_switchover(call: str) -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        original = getattr(here.guest, call)

        def cancelled_inside() -> object:
            setattr(here.guest, call, original)
            here.controller.cancel()
            return original()

        setattr(here.guest, call, cancelled_inside)
        here.controller.migrate(address)
        here.wait_status(MigrationStatus.CANCELLING)
        cancel_and_migrate_again(here, there, address)


def test_cancel_while_the_destination_loads() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        loading, go_on = threading.Event(), threading.Event()
        original = there.guest.load_devices

        def load_slowly(states: object, ignored: object) -> None:
            loading.set()
            assert go_on.wait(300)
            original(states, ignored)  # type: ignore[arg-type]

        there.guest.load_devices = load_slowly  # type: ignore[assignment,method-assign]
        here.controller.migrate(address)
        assert loading.wait(300)
        here.controller.cancel()
        assert here.outcome().status is CANCELLED
        go_on.set()
        there.wait_status(FAILED)
        assert assert_one_runs(here.guest, there.guest) is here.guest
        assert here.migrate(address).status is COMPLETED


def test_cancel_after_commit_asks_the_destination() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        original = there.guest.resume

        def cancelled_inside() -> int:
            here.controller.cancel()
            return original()

        there.guest.resume = cancelled_inside  # type: ignore[method-assign]
        info = here.migrate(address)
        assert info.status is COMPLETED
        assert here.statuses[-2:] == ["cancelling", "completed"]
        assert assert_one_runs(here.guest, there.guest) is there.guest


def test_cancel_when_the_destination_stops_reading() -> None:
    with hosts(source_guest(20_000)) as (here,), socket.create_server(("127.0.0.1", 0)) as server:
        # A QEMU in name: it answers the greeting, then falls silent with full buffers.
        here.controller.set_parameters({"max-bandwidth": 0})
        here.controller.migrate(f"tcp:127.0.0.1:{server.getsockname()[1]}")
        peer, _ = server.accept()
        with peer:
            peer.sendall(bytes.fromhex("0002 0004 53544e41"))
            here.wait_pass(1)
            cancel_and_migrate_again(here, None, "")


def test_closing_the_controller_cancels() -> None:
    with hosts(source_guest(2000), waiting_guest(2000)) as (here, there):
        here.controller.set_parameters({"max-bandwidth": 1_000_000})
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(1)
        here.controller.close()
        assert here.controller.info().status is CANCELLED
        assert here.guest.running
        there.wait_status(FAILED)
        there.controller.close()


def test_the_bandwidth_limit_holds_and_can_be_lifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that only waiting moves: whatever else the machine does, the source waits for as long as the limit asks."""
    waited = [0.0]

    def wait(seconds: float) -> None:
        waited[0] += seconds

    monkeypatch.setattr(
        "sterna.migration.source.context.RateLimiter",
        lambda rate, sleep: RateLimiter(rate, clock=lambda: waited[0], sleep=wait),
    )
    with hosts(source_guest(2000, steps_per_ms=1, steps_per_harvest=100), waiting_guest(2000)) as (
        here,
        there,
    ):
        for page in range(2000):
            here.guest.block.data[page * 4096 : page * 4096 + 3000] = np.arange(3000) % 251
        here.controller.set_parameters({"max-bandwidth": 8_000_000, "downtime-limit": 0})
        here.guest.check_ram = there.guest.check_ram = lambda: None  # type: ignore[method-assign]
        at_looks: list[float] = []
        harvest = here.guest.harvest

        def timed_harvest() -> list[DirtyBatch]:
            at_looks.append(waited[0])
            return harvest()

        here.guest.harvest = timed_harvest  # type: ignore[method-assign]
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(2)
        first = here.controller.info().passes[0]
        assert first.bytes / at_looks[0] == pytest.approx(8_000_000, rel=0.05)
        here.controller.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
        assert here.outcome().status is COMPLETED


def test_a_silent_destination_does_not_keep_the_guest_stopped() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        go_on = threading.Event()
        original = there.guest.load_devices

        def hang(states: object, ignored: object) -> None:
            assert go_on.wait(300)
            original(states, ignored)  # type: ignore[arg-type]

        there.guest.load_devices = hang  # type: ignore[assignment,method-assign]
        here.controller.set_parameters({"x-sterna-switchover-timeout": 100})
        info = here.migrate(address)
        assert info.status is FAILED
        assert info.error == "the destination did not take the stopped guest over within 0.1 s"
        assert here.guest.running
        go_on.set()
        there.wait_status(FAILED)
        assert_one_runs(here.guest, there.guest)


def test_an_attempt_that_comes_while_the_last_one_is_cleared_away_waits_for_it() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        address = there.controller.incoming(TCP)
        there.guest.fail["load_devices"] = RuntimeError("not yet")
        for _ in range(20):
            assert here.migrate(address).error == "destination refused: internal error: RuntimeError: not yet"
        there.guest.fail.clear()
        assert here.migrate(address).status is COMPLETED


def test_a_host_that_cannot_run_the_guest_is_refused_before_anything_is_sent() -> None:
    with hosts(source_guest(), waiting_guest()) as (here, there):
        here.guest.traits = [Trait("CPUID 0x7 EBX", Rule.BITS, 0b110)]
        there.guest.host = {"CPUID 0x7 EBX": 0b010}
        address = there.controller.incoming(TCP)
        info = here.migrate(address)
        assert info.status is FAILED
        assert info.error == "the destination's host cannot run this guest: CPUID 0x7 EBX: it lacks bits 0x4"
        assert here.guest.logging_started == 0
        there.guest.host = {"CPUID 0x7 EBX": 0b1110}
        assert here.migrate(address).status is COMPLETED
        assert_one_runs(here.guest, there.guest)
