"""Files that take their place when they are complete: what was there before survives everything else."""

import errno
import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.refusal import Refusal, refusing

from sterna.host.newfile import (
    NewFile,
    NotAFileError,
    UnsyncedError,
    check_report,
    open_for_reading,
    write_report,
)

OLD, NEW = b"what was there", b"what is new"
TIMEOUT = 60.0


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    path = tmp_path / "guest"
    path.write_bytes(OLD)
    path.chmod(0o644)
    return path


@pytest.fixture
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_old_file_is_there_until_the_new_one_is_whole(target: Path) -> None:
    with NewFile(target, private=True) as file:
        file.write(NEW)
        assert target.read_bytes() == OLD
        file.commit()
        assert target.read_bytes() == NEW
        file.close()
    assert names(target.parent) == {"guest"}
    assert target.read_bytes() == NEW


def test_a_file_that_is_given_up_was_never_there(target: Path) -> None:
    for path in (target, target.with_name("another")):
        with NewFile(path, private=True) as file:
            file.write(NEW)
        assert names(target.parent) == {"guest"}
    assert target.read_bytes() == OLD


@pytest.mark.usefixtures("no_umask")
def test_guest_ram_is_for_its_owner_only_whatever_it_replaces(target: Path) -> None:
    for path in (target, target.with_name("another")):
        with NewFile(path, private=True) as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600, "also while it is written"
            file.commit()
        assert mode(path) == 0o600


@pytest.mark.usefixtures("no_umask")
def test_reports_are_for_everybody_whom_the_umask_lets(target: Path) -> None:
    target.chmod(0o640)
    write_report(target, NEW)
    assert mode(target) == 0o640, "as the one before"
    other = target.with_name("another")
    os.umask(0o022)
    write_report(other, NEW)
    assert mode(other) == 0o644
    assert target.read_bytes() == other.read_bytes() == NEW


def test_links_stay_and_what_they_lead_to_is_replaced(target: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    link, first = tmp_path / "links" / "link", tmp_path / "first"
    first.symlink_to("links/link")
    for there, what in ((True, "../guest"), (False, "../not-there-yet")):
        link.unlink(missing_ok=True)
        link.symlink_to(what)
        with NewFile(first, private=True) as file:
            file.write(NEW)
        assert (link.resolve().exists(), link.is_symlink()) == (there, True)
        with NewFile(first, private=True) as file:
            file.write(NEW)
            file.commit()
        assert (os.readlink(first), os.readlink(link)) == ("links/link", what)
        assert link.resolve().read_bytes() == NEW
    assert names(tmp_path) == {"guest", "links", "first", "not-there-yet"}
    assert names(tmp_path / "links") == {"link"}


# -- what fails on the way -------------------------------------------------------------------------------------


def write_and_commit(file: NewFile) -> None:
    with file:
        file.write(NEW)
        file.commit()


@pytest.mark.parametrize("call", ["write", "fsync", "close", "renameat"])
def test_a_disk_that_fails_at_any_step_leaves_what_was_there(call: str, target: Path) -> None:
    """Also: that it is written to the disk before it takes its place, since a disk that cannot do that is noticed."""
    file = NewFile(target, private=True)
    fd = None if call == "renameat" else file.fileno()
    with pytest.raises(OSError, match="No space left") as caught:
        refusing(Refusal(call, errno.ENOSPC, fd=fd), lambda: write_and_commit(file))
    assert caught.value.errno == errno.ENOSPC
    assert target.read_bytes() == OLD
    assert names(target.parent) == {"guest"}
    if call == "close":
        os.close(fd or -1)


def test_the_directory_is_written_to_the_disk_too(target: Path) -> None:
    file = NewFile(target, private=True)
    with pytest.raises(UnsyncedError, match=r"in its place.*Input/output error") as caught:
        refusing(Refusal("fsync", errno.EIO, other_than=file.fileno()), lambda: write_and_commit(file))
    assert caught.value.errno == errno.EIO
    assert target.read_bytes() == NEW
    target.write_bytes(OLD)
    file = NewFile(target, private=True)
    refusing(Refusal("fsync", errno.EINVAL, other_than=file.fileno()), lambda: write_and_commit(file))
    assert target.read_bytes() == NEW, "a file system that cannot be asked for it"


def test_a_write_that_is_cut_short_goes_on(tmp_path: Path) -> None:
    """A signal's handler in the middle of a write to a pipe, whose reader takes a little at a time."""
    reader, writer = os.pipe()
    data = os.urandom(300_000)
    file = NewFile(tmp_path / "file", private=True)
    os.dup2(writer, file.fileno())
    os.close(writer)
    got = bytearray()

    def read() -> None:
        while piece := os.read(reader, 5000):
            got.extend(piece)

    os.set_blocking(file.fileno(), True)
    thread = threading.Thread(target=read)
    thread.start()
    with file:
        file.write(data)
    thread.join(TIMEOUT)
    os.close(reader)
    assert bytes(got) == data


# -- what cannot be replaced -----------------------------------------------------------------------------------


@pytest.fixture
def places(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Paths that lead to no regular file, and what they lead to."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("fifo")
    with socket.socket(socket.AF_UNIX) as sock, open(tmp_path / "opened", "wb") as opened:
        sock.bind(str(tmp_path / "socket"))
        yield {
            str(tmp_path / "fifo"): "a named pipe",
            str(tmp_path / "link"): "a named pipe",
            str(tmp_path / "socket"): "a socket",
            "/dev/null": "a character device",
            f"/dev/fd/{opened.fileno()}": "the name of an open descriptor",
            f"/proc/self/fd/{opened.fileno()}": "the name of an open descriptor",
            str(tmp_path): "a directory",
            f"{tmp_path}/new/": "a directory",
        }


def test_nothing_else_than_a_file_is_replaced_and_nothing_waits(places: dict[str, str]) -> None:
    for path, kind in places.items():
        with pytest.raises(NotAFileError, match=f"it is {kind}, not a regular file") as caught:
            NewFile(path, private=True)
        assert caught.value.takes_bytes == (kind != "a directory")


def test_paths_that_cannot_be_had_say_why(target: Path) -> None:
    directory = target.parent
    for path, code in {
        "": errno.ENOENT,
        f"{directory}/no/file": errno.ENOENT,
        f"{target}/file": errno.ENOTDIR,
        f"{directory}/{'x' * 256}": errno.ENAMETOOLONG,
        "/proc/self/new": errno.ENOENT,
        "a\0b": errno.EINVAL,
        "\ud800": errno.EINVAL,
    }.items():
        with pytest.raises(OSError, match=r"\[Errno") as caught:
            NewFile(path, private=True)
        assert caught.value.errno == code, path
        assert "\n" not in str(caught.value.strerror)
    (directory / "round").symlink_to("round")
    with pytest.raises(OSError, match="symbolic links"):
        NewFile(directory / "round", private=True)
    assert names(directory) == {"guest", "round"}


def test_who_may_not_write_a_file_may_not_replace_it() -> None:
    """In a process that is not root's: neither a file that is read-only, nor in a directory that is."""
    script = """
import os, sys
from sterna.host.newfile import NewFile, check_report
if os.geteuid() == 0:
    os.setgroups([]); os.setgid(65534); os.setuid(65534)
for path in sys.argv[1:]:
    for make in (lambda: NewFile(path, private=True), lambda: check_report(path)):
        try:
            make()
        except PermissionError as error:
            print(error.strerror)
"""
    with tempfile.TemporaryDirectory() as name:  # a directory of pytest's is its user's alone
        directory = Path(name)
        directory.chmod(0o777)
        (directory / "kept").write_bytes(OLD)
        (directory / "kept").chmod(0o444)
        (directory / "closed").mkdir(0o555)
        done = subprocess.run(
            [sys.executable, "-c", script, str(directory / "kept"), str(directory / "closed" / "new")],
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=True,
        )
        assert done.stdout.splitlines() == ["Permission denied"] * 4
        assert (directory / "kept").read_bytes() == OLD
        assert names(directory) == {"kept", "closed"}
        assert not names(directory / "closed")


# -- reading, and reports --------------------------------------------------------------------------------------


def test_what_would_wait_for_another_process_is_not_opened_for_reading(places: dict[str, str]) -> None:
    for path, kind in places.items():
        if kind in ("a named pipe", "a socket") or (kind == "a directory" and not path.endswith("/")):
            with pytest.raises(NotAFileError, match=f"it is {kind}"):
                open_for_reading(path)
    fd = open_for_reading("/dev/zero")
    assert os.read(fd, 3) == bytes(3)
    os.close(fd)


def test_reports_go_into_devices_and_descriptors_too(tmp_path: Path) -> None:
    check_report("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_report("/dev/full", NEW)
    write_report("/dev/null", NEW)
    reader, writer = os.pipe()
    write_report(f"/dev/fd/{writer}", NEW)
    assert os.read(reader, 100) == NEW
    os.close(reader)
    os.close(writer)
    with open(tmp_path / "out", "wb", buffering=0) as out:
        out.write(OLD)
        check_report(f"/dev/fd/{out.fileno()}")
        write_report(f"/dev/fd/{out.fileno()}", NEW)
    assert (tmp_path / "out").read_bytes() == OLD + NEW
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_report_is_checked_without_a_trace(target: Path) -> None:
    check_report(target)
    check_report(target.with_name("new"))
    for path in (target.with_name("no") / "new", target / "new", target.parent):
        with pytest.raises(OSError, match=r"No such file|Not a directory|it is a directory"):
            check_report(path)
    assert names(target.parent) == {"guest"}
    assert target.read_bytes() == OLD


def test_a_file_without_a_name_is_written_in_place() -> None:
    """What only a descriptor leads to: nobody's file is replaced by it."""
    fd = os.memfd_create("unnamed")
    try:
        os.write(fd, b"longer than what follows")
        with NewFile(f"/proc/{os.getpid()}/fd/{fd}", private=True) as file:
            file.write(b"new")
            file.commit()
        assert os.pread(fd, 100, 0) == b"new"
    finally:
        os.close(fd)
