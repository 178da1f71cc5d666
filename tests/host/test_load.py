"""How busy the host was, from what the kernel tells."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sterna.host.load import HostLoad, HostWatch

BURN = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True); input()"
BUSY = HostLoad(4, 14.37, 0.5, 0.125, 0.75)


def write_proc(proc: Path, cpu: str, processes: dict[int, tuple[int, int, int]], stalled_us: int) -> None:
    """:param processes: by pid: parent, ticks of its own, ticks of its children that have ended"""
    (proc / "pressure").mkdir(parents=True, exist_ok=True)
    (proc / "stat").write_text(f"cpu  {cpu} 0 0\ncpu0 1 2 3\n")
    (proc / "loadavg").write_text("14.37 9.20 5.54 25/217 18622\n")
    (proc / "uptime").write_text(f"{100 + stalled_us / 750_000:.2f} 6377.88\n")
    (proc / "pressure" / "cpu").write_text(
        f"some avg10=9.0 avg60=1.0 avg300=0.1 total={stalled_us}\nfull x\n"
    )
    for pid, (parent, own, ended) in processes.items():
        (proc / str(pid)).mkdir(exist_ok=True)
        filler = " ".join("0" * 9)
        (proc / str(pid) / "stat").write_bytes(
            b"%d (a ) \xff name) S %d %b %d 0 0 %d 20 0\n" % (pid, parent, filler.encode(), own, ended)
        )


def test_what_others_had_is_what_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    me, other = os.getpid(), os.getpid() + 3
    child, grandchild = me + 1, me + 2
    write_proc(tmp_path, "100 10 50 999 5 7 7 0", {me: (1, 9, 0), child: (me, 0, 0), other: (1, 1000, 0)}, 0)
    watch = HostWatch(tmp_path)
    # 300 ticks of users, nice ones and the kernel, of which 100 are ours; 400 of 400 in all, with idle ones and stolen ones.
    processes = {me: (1, 19, 40), child: (me, 20, 0), grandchild: (child, 0, 30), other: (1, 9000, 9000)}
    write_proc(tmp_path, "200 60 200 1041 5 10 12 50", processes, 3_000_000)
    assert str(watch.load()) == str(BUSY)
    assert watch.load() == BUSY
    assert BUSY.taken == 0.625


def test_in_words() -> None:
    assert str(BUSY) == (
        "host meanwhile: 4 CPUs, load 14.4, other processes 50 %, stolen 12 %, CPU pressure 75 %"
    )
    assert str(HostLoad(1, None, None, None, None)) == "host meanwhile: 1 CPU"


def test_a_kernel_that_tells_nothing(tmp_path: Path) -> None:
    load = HostWatch(tmp_path / "nothing").load()
    assert (load.load_average, load.others, load.stolen, load.waiting, load.taken) == (
        None,
        None,
        None,
        None,
        0,
    )


def test_a_kernel_without_pressure(tmp_path: Path) -> None:
    write_proc(tmp_path, "1 1 1 1 1 1 1 1", {os.getpid(): (1, 0, 0)}, 0)
    (tmp_path / "pressure" / "cpu").unlink()
    load = HostWatch(tmp_path).load()
    assert load.waiting is None
    assert load.others is None  # no time has passed


def test_children_are_ours_while_they_run_and_after() -> None:
    watch = HostWatch()
    before = sum(watch._own_ticks())
    with subprocess.Popen(
        [sys.executable, "-c", BURN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        least = 0.19 * os.sysconf("SC_CLK_TCK")
        assert sum(watch._own_ticks()) - before >= least
        child.communicate(b"\n")
    assert sum(watch._own_ticks()) - before >= least


def test_this_host_tells() -> None:
    load = HostWatch().load()
    assert load.cpus == os.cpu_count()
    assert load.load_average is not None


def test_a_test_that_fails_says_how_busy_the_host_was(tmp_path: Path) -> None:
    path = tmp_path / "test_it.py"
    path.write_text("def test_good(): pass\ndef test_bad(): assert False\n")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-p",
            "tests.conftest",
            "-p",
            "no:cacheprovider",
            "--rootdir",
            tmp_path,
            path,
        ],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert "1 failed, 1 passed" in done.stdout
    assert done.stdout.count("host meanwhile: ") == 1
