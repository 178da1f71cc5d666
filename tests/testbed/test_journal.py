"""What a run leaves, after each kind of ending."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from sterna.testbed import journal
from sterna.testbed.errors import BedError
from sterna.testbed.journal import EntryKind, Journal, clean_stale

SCRIPT = """
import sys, time
from pathlib import Path
from sterna.testbed.journal import Journal
with Journal(Path(sys.argv[1])) as remains:
    path = remains.make_directory()
    (path / "file").write_text("x")
    print(path, flush=True)
    {end}
"""


def run(directory: Path, end: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(end=end), str(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def made(process: "subprocess.Popen[str]") -> Path:
    assert process.stdout is not None
    return Path(process.stdout.readline().strip())


@pytest.mark.parametrize("end", ["pass", "raise ValueError", "sys.exit(3)", "raise KeyboardInterrupt"])
def test_an_orderly_end_leaves_nothing(tmp_path: Path, end: str) -> None:
    with run(tmp_path / "runs", end) as process:
        path = made(process)
        process.wait(300)
    assert path.name.startswith("sterna-testbed-")
    assert not path.exists()
    assert list((tmp_path / "runs").iterdir()) == []


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    with run(tmp_path / "runs", "time.sleep(60)") as process:
        path = made(process)
        assert (path / "file").exists()
        assert clean_stale(tmp_path / "runs") == []  # it is at work
        assert path.exists()
        process.send_signal(signal.SIGKILL)
        process.wait(300)
    assert path.exists()
    assert clean_stale(tmp_path / "runs") == [f"directory {path}"]
    assert not path.exists()
    assert clean_stale(tmp_path / "runs") == []
    assert list((tmp_path / "runs").iterdir()) == []


def test_a_killed_run_is_over_when_what_it_was_starting_has_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process between fork and exec has the lock too."""
    start = "import os; child = os.fork(); child and print(child, flush=True); time.sleep(60)"
    with run(tmp_path / "runs", start) as process:
        path = made(process)
        assert process.stdout is not None
        child = int(process.stdout.readline())
        process.kill()
        process.wait(300)

        def look_again(seconds: float) -> None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

        monkeypatch.setattr(journal.time, "sleep", look_again)
        assert clean_stale(tmp_path / "runs") == [f"directory {path}"]


class Enough(Exception):
    """Ends a wait."""


@pytest.mark.parametrize("use", [clean_stale, Journal])
def test_who_waits_for_another_run_says_so(tmp_path: Path, use: Callable[..., object]) -> None:
    told = []

    def say(text: str) -> None:
        told.append(text)
        raise Enough

    tmp_path.chmod(0o700)
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(Enough):
        use(tmp_path, say)
    os.close(other)
    assert told == [f"another run is at work in {tmp_path}: waiting for it"]


def test_a_run_that_ends_meanwhile_has_left_nothing(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    (runs / "1-x").symlink_to("nothing")  # as one that was listed and has gone
    assert clean_stale(runs) == []


def test_a_line_cut_short_does_not_hide_those_before(tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "1-x").write_text(f'{{"kind":"directory","path":"{left}"}}\n{{"kind":"dire')
    assert clean_stale(tmp_path / "runs") == [f"directory {left}"]
    assert not left.exists()


def test_swap_and_mounts_of_a_killed_run(tmp_path: Path, root: None) -> None:
    swap, mount = tmp_path / "swap", tmp_path / "mount"
    mount.mkdir()
    swap.write_bytes(bytes(1 << 20))
    swap.chmod(0o600)
    subprocess.run(["mkswap", str(swap)], check=True, capture_output=True)
    subprocess.run(["swapon", str(swap)], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(mount)], check=True)
    try:
        (tmp_path / "runs").mkdir()
        (tmp_path / "runs" / "1-x").write_text(
            f'{{"kind":"swap","path":"{swap}"}}\n{{"kind":"mount","path":"{mount}"}}\n'
        )
        assert clean_stale(tmp_path / "runs") == [f"swap {swap}", f"mount {mount}"]
        assert str(swap) not in Path("/proc/swaps").read_text()
        assert str(mount) not in Path("/proc/mounts").read_text()
        assert not swap.exists()
        assert not mount.exists()
    finally:
        subprocess.run(["swapoff", str(swap)], check=False, capture_output=True)
        subprocess.run(["umount", str(mount)], check=False, capture_output=True)


def test_what_cannot_be_undone_stays_noted(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    runs.mkdir()
    busy = tmp_path / "file"
    busy.write_text("no directory")
    (runs / "1-x").write_text(f'{{"kind":"directory","path":"{busy}"}}\n')
    with pytest.raises(BedError, match=str(busy)):
        clean_stale(runs)
    assert (runs / "1-x").exists()


def test_one_entry_can_be_undone_early(tmp_path: Path) -> None:
    with Journal(tmp_path / "runs") as journal:
        path = journal.make_directory()
        journal.undo(EntryKind.DIRECTORY, path)
        assert not path.exists()
    assert list((tmp_path / "runs").iterdir()) == []


def others_may_write(runs: Path) -> None:
    runs.chmod(0o770)


def it_is_anothers(runs: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives files away")
    os.chown(runs, 65534, 65534)


def it_is_a_link(runs: Path) -> None:
    runs.rename(runs.with_name("mine"))
    runs.symlink_to("mine")


@pytest.mark.parametrize("spoil", [others_may_write, it_is_anothers, it_is_a_link])
def test_a_directory_that_another_user_can_have_filled_is_left_alone(
    tmp_path: Path, spoil: Callable[[Path], None]
) -> None:
    """Its name is known to all: what it leads to would be removed."""
    runs = tmp_path / "runs"
    runs.mkdir(mode=0o700)
    (runs / "1-notes").write_text("of another program")
    spoil(runs)
    for use in (clean_stale, Journal):
        with pytest.raises(BedError, match=f"{runs} is a link|belongs to user|others may write to {runs}"):
            use(runs)
    assert [path.name for path in runs.iterdir()] == ["1-notes"]
