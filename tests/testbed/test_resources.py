"""A host that runs short, on the real kernel; and what is left afterwards."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.vms import wait_for

from sterna.launch.errors import Unsupported
from sterna.testbed.journal import EntryKind, Journal, clean_stale
from sterna.testbed.resources import FullDisk, MemoryGroup, swapped_bytes, use_swap_file

HOG = """
import sys, time
sys.stdin.readline()
memory = bytearray(64 << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
print("all touched", flush=True)
time.sleep(60)
"""


CALLER = """
import os, sys, threading
sys.stdin.readline()
def call():
    while True:
        try:
            ends = os.pipe()
            os.write(ends[1], bytes(60000))
            for end in ends:
                os.close(end)
        except OSError as error:
            os._exit(error.errno)
threading.Thread(target=call, daemon=True).start()
memory = bytearray(64 << 20)
for at in range(0, len(memory), 4096):
    memory[at] = 1
print("all touched", flush=True)
sys.stdin.readline()
os._exit(0)
"""
"""The same, with a thread whose system calls take memory meanwhile."""


@pytest.fixture
def journal(tmp_path: Path, root: None) -> Iterator[Journal]:
    with Journal(tmp_path / "runs") as made:
        yield made


@pytest.fixture
def group(journal: Journal) -> MemoryGroup:
    try:
        return MemoryGroup(journal)
    except Unsupported as error:
        pytest.skip(str(error))


@pytest.fixture
def hog() -> Iterator["subprocess.Popen[str]"]:
    """A process that takes 64 MiB when it is given a line."""
    command = [sys.executable, "-c", HOG]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def go(process: "subprocess.Popen[str]") -> str:
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("\n")
    process.stdin.flush()
    return process.stdout.readline()


def test_a_group_without_swap_kills(group: MemoryGroup, hog: "subprocess.Popen[str]") -> None:
    group.add(hog.pid)
    group.limit(16 << 20)
    assert go(hog) == ""
    assert hog.wait(300) == -9
    group.close()


def test_a_squeezed_group_keeps_what_cannot_be_reclaimed(group: MemoryGroup) -> None:
    """No process is killed, and no system call is refused."""
    command = [sys.executable, "-c", CALLER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as hog:
        group.add(hog.pid)
        group.squeeze(32 << 20)
        said = go(hog)
        assert (said, hog.poll()) == ("all touched\n", None)
        assert group.usage() > 64 << 20
        go(hog)
        assert hog.wait(300) == 0
    group.close()


def test_a_squeezed_group_swaps(
    group: MemoryGroup, journal: Journal, hog: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    use_swap_file(journal, tmp_path, 128 << 20)
    group.add(hog.pid)
    group.squeeze(32 << 20)
    assert go(hog) == "all touched\n"
    wait_for(lambda: group.usage() <= 33 << 20)
    assert swapped_bytes(hog.pid) > 16 << 20
    hog.kill()
    hog.wait(300)


def test_a_group_with_swap_swaps(
    group: MemoryGroup, journal: Journal, hog: "subprocess.Popen[str]", tmp_path: Path
) -> None:
    use_swap_file(journal, tmp_path, 128 << 20)
    assert str(tmp_path / "swap") in Path("/proc/swaps").read_text()
    group.add(hog.pid)
    group.limit(32 << 20)
    assert go(hog) == "all touched\n"
    wait_for(lambda: swapped_bytes(hog.pid) > 16 << 20)
    hog.kill()
    hog.wait(300)
    journal.undo(EntryKind.SWAP, tmp_path / "swap")
    assert str(tmp_path) not in Path("/proc/swaps").read_text()
    assert not (tmp_path / "swap").exists()


def test_a_swap_file_says_what_it_lacks(
    journal: Journal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(journal, tmp_path)
    with pytest.raises(Unsupported, match="no room for a swap file of 64 MiB: No space left on device"):
        use_swap_file(journal, disk.path, 64 << 20)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        with pytest.raises(Unsupported, match="mkswap is missing: apt install util-linux"):
            use_swap_file(journal, tmp_path, 1 << 20)
    journal.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_a_full_disk_takes_no_byte_more(journal: Journal, tmp_path: Path) -> None:
    disk = FullDisk(journal, tmp_path)
    with (disk.path / "log").open("wb", buffering=0) as log:
        log.write(b"room")
        disk.fill()
        log.write(bytes(1 << 13))  # its own page has some room
        with pytest.raises(OSError, match="No space"):
            log.write(bytes(1 << 13))
    disk.close()
    assert not disk.path.exists()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_all_go_with_a_killed_run(tmp_path: Path, root: None) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from sterna.testbed.journal import Journal\n"
        "from sterna.testbed.resources import FullDisk, MemoryGroup, use_swap_file\n"
        "directory = Path(sys.argv[1])\n"
        "remains = Journal(directory / 'runs')\n"
        "FullDisk(remains, directory)\n"
        "use_swap_file(remains, directory, 1 << 20)\n"
        "MemoryGroup(remains)\n"
        "print('made', flush=True)\n"
        "time.sleep(60)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        if process.stdout.readline() != "made\n":
            assert process.stderr is not None
            said = process.stderr.read().splitlines()[-1]
            assert "Unsupported" in said
            pytest.skip(said)
        process.kill()
        process.wait(300)
        assert str(tmp_path) in Path("/proc/swaps").read_text()
        assert str(tmp_path) in Path("/proc/mounts").read_text()
        assert len(clean_stale(tmp_path / "runs")) == 3
    assert str(tmp_path) not in Path("/proc/swaps").read_text()
    assert str(tmp_path) not in Path("/proc/mounts").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]


def test_without_root_it_says_so(tmp_path: Path) -> None:
    script = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from sterna.launch.errors import Unsupported\n"
        "from sterna.testbed.journal import Journal\n"
        "from sterna.testbed.resources import FullDisk, MemoryGroup, use_swap_file\n"
        "directory = Path(sys.argv[1])\n"
        "os.chmod(directory, 0o777)\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "with Journal(directory / 'runs') as remains:\n"
        "    for make in (lambda: MemoryGroup(remains), lambda: use_swap_file(remains, directory, 4096),\n"
        "                 lambda: FullDisk(remains, directory)):\n"
        "        try: make()\n"
        "        except Unsupported as error: print(error)\n"
    )
    for folder in (tmp_path, *tmp_path.parents):
        if "pytest-" in str(folder):
            os.chmod(folder, 0o755)
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("need") == 3, done.stdout
