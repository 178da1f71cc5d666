"""What cannot be done is refused before it has any effect."""

import errno
import inspect
import os
import socket
import stat
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tests.migration.pairs import TCP, assert_one_runs, hosts, source_guest, waiting_guest
from tests.ports import held_port
from tests.refusal import Refusal, refuse, refusing

from sterna.analysis.proxy.proxy import Proxy
from sterna.analysis.proxy.recording import RecordingError
from sterna.migration.channels.tcp import TcpUri
from sterna.migration.channels.unix import UnixUri
from sterna.migration.controller import MigrationController
from sterna.migration.errors import ChannelError, StateError, UriError
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import Event, NotTheOwner, OwnershipState
from sterna.stream.vmstate import DeviceState
from sterna.testing.guest import DoubleGuest

COMPLETED, FAILED, CANCELLED = MigrationStatus.COMPLETED, MigrationStatus.FAILED, MigrationStatus.CANCELLED
OLD = b"a guest, and its only copy"


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_guest_that_has_left_touches_no_file(tmp_path: Path) -> None:
    saved, marker = tmp_path / "saved", tmp_path / "marker"
    with hosts(source_guest()) as (here,):
        assert here.migrate(f"file:{saved}").status is COMPLETED
        before = saved.stat()
        for uri in (f"file:{saved}", f"exec:touch {marker}"):
            with pytest.raises(StateError, match="the guest was saved, and stands still; 'cont' first"):
                here.controller.migrate(uri)
        assert here.controller.info().status is COMPLETED, "what was is still what is told"
        assert (saved.stat().st_ino, saved.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert names(tmp_path) == {"saved"}


def test_a_guest_that_has_left_uses_up_no_destination() -> None:
    with hosts(source_guest(), waiting_guest(), waiting_guest()) as (here, there, other):
        assert here.migrate(there.controller.incoming(TCP)).status is COMPLETED
        address = other.controller.incoming(TCP)
        with pytest.raises(NotTheOwner, match="runs at the destination"):
            here.controller.migrate(address)
        assert there.migrate(address).status is COMPLETED
        assert_one_runs(there.guest, other.guest)
        assert other.statuses.count("active") == 1, "nobody else came"


def test_a_guest_is_not_sent_where_nobody_can_wait() -> None:
    with hosts(source_guest()) as (here,):
        for ask in (here.controller.migrate, here.controller.resolve_doubt):
            with pytest.raises(UriError, match="nobody can be connected to at port 0"):
                ask(TCP)
        assert here.statuses == []


@pytest.mark.parametrize("end", ["cancelled", "failed", "full"])
def test_a_save_that_comes_to_nothing_leaves_what_was_there(end: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.write_bytes(OLD)
    with hosts(source_guest(512)) as (here,):
        if end == "cancelled":
            here.controller.set_parameters({"max-bandwidth": 100_000})
            here.controller.migrate(f"file:{saved}")
            here.wait_pass(1)
            here.controller.cancel()
            assert here.outcome().status is CANCELLED
        elif end == "failed":
            here.guest.fail["save_devices"] = RuntimeError("the device is jammed")
            assert here.migrate(f"file:{saved}").status is FAILED
        else:
            # The disk is full when the file is to be synced: the kernel took the writes before.
            refusal = Refusal("fsync", errno.ENOSPC)
            refusing(refusal, lambda: here.controller.migrate(f"file:{saved}"))
            info = here.outcome()
            assert (info.status, info.error) == (
                FAILED,
                f"completing file:{saved}: no space left on device",
            )
        assert here.guest.running
        assert not here.guest.away
    assert saved.read_bytes() == OLD
    assert names(tmp_path) == {"saved"}


def test_a_save_whose_directory_cannot_be_synced_is_there_all_the_same(tmp_path: Path) -> None:
    """The old file is gone by then, and the new one can be loaded: it is not as if nothing had been saved."""
    saved = tmp_path / "saved"
    saved.write_bytes(OLD)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        save_devices = here.guest.save_devices

        def disk_fails() -> list[DeviceState]:
            [file] = [fd for fd in descriptors() if os.readlink(f"/proc/self/fd/{fd}").endswith(".part")]
            refuse(Refusal("fsync", errno.EIO, other_than=file))
            return save_devices()

        here.guest.save_devices = disk_fails  # type: ignore[method-assign]
        info = here.migrate(f"file:{saved}")
        assert (info.status, info.error) == (
            FAILED,
            f"completing file:{saved}: it is in its place, but a power failure may undo that: its directory cannot be written "
            "to the disk: input/output error; the guest was saved, and stands still: 'cont' runs it",
        )
        assert here.guest.ownership.state is OwnershipState.SAVED
        assert (here.guest.running, here.guest.away, here.guest.logging) == (False, True, False)
        there.controller.incoming(f"file:{saved}")
        assert there.outcome().status is COMPLETED
        there.guest.check_ram()
        assert here.guest.ownership.apply(Event.CONT) is OwnershipState.OWNER
    assert names(tmp_path) == {"saved"}


def descriptors() -> list[int]:
    """Of this process, regular files only."""
    with os.scandir("/proc/self/fd") as found:
        return [int(entry.name) for entry in found if entry.is_file()]


def test_a_pipe_does_not_hold_a_migration(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with hosts(source_guest(), waiting_guest()) as (here, there):
        assert "it is a named pipe, not a regular file; use exec:cat > " in here.migrate(f"file:{fifo}").error
        assert here.guest.running
        with pytest.raises(ChannelError, match="it is a named pipe, not a regular file; use exec:cat "):
            there.controller.incoming(f"file:{fifo}")
    assert stat.S_ISFIFO(fifo.stat().st_mode)


def test_descriptors_that_go_the_other_way_are_refused() -> None:
    reader, writer = os.pipe()
    try:
        with hosts(source_guest(), waiting_guest()) as (here, there):
            assert (
                here.migrate(f"fd:{reader}").error
                == f"fd:{reader} cannot be used: it is open for reading only"
            )
            with pytest.raises(
                ChannelError, match=f"fd:{writer} cannot be used: it is open for writing only"
            ):
                there.controller.incoming(f"fd:{writer}")
            assert os.get_blocking(reader)
            assert os.get_blocking(writer), "they are as they were"
    finally:
        os.close(reader)
        os.close(writer)


def test_an_address_that_cannot_be_had_does_not_use_up_the_wait(tmp_path: Path) -> None:
    with (
        hosts(source_guest(), waiting_guest()) as (here, there),
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        controller = there.controller
        controller.incoming("defer")

        def try_in_vain() -> None:
            for uri, error in {
                "nowhere": UriError,
                f"tcp:127.0.0.1:{taken.getsockname()[1]}": ChannelError,
                f"unix:{tmp_path}/no/socket": ChannelError,
                f"file:{tmp_path}/missing": ChannelError,
                "fd:987": ChannelError,
            }.items():
                with pytest.raises(error):
                    controller.incoming(uri)

        try_in_vain()
        with pytest.raises(StateError, match="guest is waiting for an incoming migration"):
            controller.migrate(f"file:{tmp_path}/new")
        (tmp_path / "broken").write_bytes(b"no stream at all")
        controller.incoming(f"file:{tmp_path}/broken")
        there.wait_status(FAILED)
        reason = controller.info().error
        try_in_vain()
        assert controller.info().error == reason != ""
        assert here.migrate(controller.incoming(TCP)).status is COMPLETED
        assert_one_runs(here.guest, there.guest)
    assert names(tmp_path) == {"broken"}


def test_a_proxy_that_cannot_begin_leaves_nothing(tmp_path: Path) -> None:
    with held_port() as port:
        taken = pytest.raises(ChannelError, match="address already in use")
        with socket.create_server(("127.0.0.1", port)), taken:
            Proxy(TcpUri("127.0.0.1", port), TcpUri("127.0.0.1", 1), record=tmp_path / "record")
        assert not names(tmp_path)
        (tmp_path / "record").touch()
        with pytest.raises(RecordingError):
            Proxy(TcpUri("127.0.0.1", port), TcpUri("127.0.0.1", 1), record=tmp_path / "record")
        with socket.create_server(("127.0.0.1", port)):
            pass  # it listens no more
    with pytest.raises(UriError, match="that is where the proxy itself is to listen"):
        Proxy(UnixUri(f"{tmp_path}/here"), UnixUri(f"{tmp_path}/here"), record=tmp_path / "new")
    assert names(tmp_path) == {"record"}


# -- nothing left, and next to nothing -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["adaptive", "fixed", "deadline"])
def test_nothing_left_to_send_fits_every_limit(policy: str) -> None:
    with hosts(DoubleGuest(64, steps_per_ms=0), waiting_guest()) as (here, there):
        here.guest.advance_steps(50)
        here.controller.set_parameters({"x-sterna-policy": policy, "downtime-limit": 0})
        info = here.migrate(there.controller.incoming(TCP))
        assert info.status is COMPLETED, info.error
        assert info.passes[-2].dirty_pages == 0
        assert_one_runs(here.guest, there.guest)


def test_a_limit_that_changes_while_a_migration_is_made_is_that_of_the_migration() -> None:
    def observe(name: str, data: dict[str, Any]) -> None:
        if data.get("status") == "setup":
            controller.set_parameters({"max-bandwidth": 0})

    with (
        hosts(waiting_guest()) as (there,),
        source_guest() as guest,
        MigrationController(guest, observe=observe) as controller,
    ):
        controller.set_parameters({"max-bandwidth": 100})
        controller.migrate(there.controller.incoming(TCP))
        assert controller.wait(300).status is COMPLETED


def test_a_capability_that_is_switched_on_meanwhile_is_seen() -> None:
    """Whoever migrates waits for whoever sets, and then goes by what was set."""
    inside, go_on = threading.Event(), threading.Event()

    class Changes(dict[str, bool | None]):
        def items(self) -> Any:
            inside.set()
            assert go_on.wait(300)
            return super().items()

    lines, first = inspect.getsourcelines(MigrationController.migrate)
    waits_at = first + next(i for i, line in enumerate(lines) if "with self._lock" in line)
    code = MigrationController.migrate.__code__

    def waits(thread: threading.Thread) -> bool:
        frame = sys._current_frames()[thread.ident or 0]
        return frame.f_code is code and frame.f_lineno == waits_at

    with hosts(source_guest()) as (here,), ThreadPoolExecutor(1) as setter, ThreadPoolExecutor(1) as user:
        set_ = setter.submit(here.controller.set_capabilities, Changes(multifd=True))
        assert inside.wait(300)
        thread = user.submit(threading.current_thread).result()
        migrated = user.submit(here.controller.migrate, "exec:cat > /dev/null")
        while not waits(thread):
            assert not migrated.done()
        go_on.set()
        set_.result()
        with pytest.raises(StateError, match="multifd is not supported by current protocol"):
            migrated.result()
        assert here.controller.info().status is MigrationStatus.NONE
