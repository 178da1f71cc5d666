"""`sterna bench --accel kvm`: the dirty log beside the kernel's own part of it, and migrations by each way to keep it."""

import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from sterna.bench.kvm.guest import WORK_SLOT, WritingGuest, same_pages
from sterna.bench.kvm.measure import ModeFigures, Sizes, Times
from sterna.bench.kvm.report import Modes
from sterna.host.load import HostLoad
from sterna.hypervisor.interface import DirtyLogMode
from sterna.jit.kernel import COMPILED
from sterna.memory.bitmap import full_bitmap, new_bitmap, page_numbers
from sterna.testing.conformance.backends import KvmX86

pytestmark = [pytest.mark.kvm, pytest.mark.slow]

MEBIBYTE = 1 << 20
COMMAND = [sys.executable, "-m", "sterna", "bench", "--accel", "kvm"]


@pytest.fixture
def kvm():
    if why := KvmX86().missing():
        pytest.skip(why)


def test_quick(kvm) -> None:
    command = [*COMMAND, "--json", "--quick", "--memory", "16M", "--only", "ring", "--only", "manual"]
    done = subprocess.run(
        [*command, "dirty-log", "dirty-1g"], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["accel"] == "kvm"
    assert set(result["dirty_log"]["modes"]) == {"manual", "ring"}
    for mode in result["dirty_log"]["modes"].values():
        for name, call in mode["calls"].items():
            assert call["kernel_ms"] > 0, name
            assert len(call["each_ours_ms"]) == len(call["each_kernel_ms"]) == result["dirty_log"]["rounds"]
        assert mode["writes_per_second"]["no log"] > 0
    assert "clear, all" in result["dirty_log"]["modes"]["manual"]["calls"]
    [workload] = result["workloads"]
    assert [row["variant"] for row in workload["results"]] == ["manual", "ring"]
    for row in workload["results"]:
        assert (row["outcome"], row["verified"]) == ("completed", True)
        assert row["median"]["downtime_ms"] > 0
    assert result["goals"] == []  # they are about memory of full size


WITHOUT_THE_EMULATED_CPU = """
import sys
sys.modules["unicorn"] = None
from sterna.cli import main
main(sys.argv[1:])
"""


@pytest.mark.skipif(not COMPILED, reason="without numba nothing is compiled")
def test_it_compiles_first_and_only_what_kvm_needs(kvm, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            WITHOUT_THE_EMULATED_CPU,
            *COMMAND[3:],
            "--quick",
            "--only",
            "ring",
            "dirty-log",
        ],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    first, second = done.stderr.splitlines()
    assert "compiling kernels" in first
    assert second == "dirty log, ring: measured"


@pytest.mark.parametrize("mode", list(DirtyLogMode))
def test_the_guest_writes_what_it_is_told(kvm, mode) -> None:
    with WritingGuest(mode, 4 * MEBIBYTE) as guest:
        guest.vm.set_memory_slot(guest.with_log(True))
        if mode is DirtyLogMode.MANUAL:
            guest.vm.harvest_dirty_log(WORK_SLOT)
        guest.write(10, stride=100)
        assert page_numbers(guest.vm.harvest_dirty_log(WORK_SLOT)).tolist() == list(range(0, 1000, 100))
        guest.write(3, passes=5)
        assert guest.words()[:4].tolist() == [6, 6, 6, 0]
        end = time.monotonic() + 60
        while not guest.write_for(0.05, harvest_every=0.01):
            assert time.monotonic() < end, "the guest writes nothing"
        guest.write(guest.pages)
        guest.write_for(0.01)
        assert set(np.unique(np.diff(guest.words()))) <= {-1, 0}


def test_a_log_that_says_something_else_is_told_from_the_right_one() -> None:
    right = new_bitmap(300)
    for page in (0, 100, 200):
        right[page // 64] |= np.uint64(1 << page % 64)
    assert same_pages(right, 3, 100)
    wrong = right.copy()
    wrong[1] |= np.uint64(1)
    assert not same_pages(wrong, 3, 100)
    assert not same_pages(new_bitmap(300), 3, 100)
    assert same_pages(full_bitmap(300), 300, 1)


def figures(**calls: tuple[float, float]) -> ModeFigures:
    names = {"all": "harvest, all", "sparse": "harvest, 1 % of all"}
    times = {
        names[name]: Times(16 << 30, [ours], [ours - kernel], [kernel])
        for name, (ours, kernel) in calls.items()
    }
    return ModeFigures(
        DirtyLogMode.BITMAP,
        times,
        {"first": 1.5, "later": 1.25},
        {"no log": 9e6, "log": 8e6, "harvests": 1e6},
    )


@pytest.mark.parametrize(
    ("every", "sparse", "met"),
    [
        ((0.0105, 0.010), (0.0105, 0.010), [True, True, True]),
        ((0.0115, 0.010), (0.0105, 0.010), [True, False, True]),
        ((0.0105, 0.010), (0.0160, 0.010), [False, True, False]),
        ((0.0105, 0.010), (0.1060, 0.100), [False, True, True]),
    ],
)
def test_goals(every, sparse, met) -> None:
    assert [one.met for one in Modes([], {}, figures=[figures(all=every, sparse=sparse)]).goals()] == met


@pytest.mark.parametrize("width", [40, 80, 110])
def test_report(width) -> None:
    console = Console(file=io.StringIO(), width=width)
    measured = [figures(all=(0.0105, 0.010), sparse=(0.02, 0.01))]
    Modes([], {"bitmap": "is not here"}, Sizes(), measured).print_calls(console)
    assert isinstance(console.file, io.StringIO)
    text = console.file.getvalue()
    for expected in (
        "16.00 GiB",
        "bitmap: is not here",
        "harvest, all",
        "10.50",
        "10.00",
        "0.50",
        "5",
        "1.25",
    ):
        assert expected in " ".join(text.split())
    assert "…" not in text
    assert max(map(len, text.splitlines()[2:])) <= width


@pytest.mark.parametrize(("own", "told"), [(0.010, 1), (0.0001, 0)])
def test_goals_that_are_missed_say_how_busy_the_host_was(own, told) -> None:
    busy = HostLoad(2, 9.5, 0.75, 0.0, None)
    measured = [figures(all=(0.1 + own, 0.1), sparse=(0.1 + own, 0.1))]
    console = Console(file=io.StringIO(), width=110)
    Modes([DirtyLogMode.BITMAP], {}, figures=measured, host=busy).print(console)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().count(f"dirty log: {busy}\n") == told


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--only", "qemu"), "no variant 'qemu'; there are: bitmap, manual, ring, raw"),
        (("dirty-logs",), "no workload 'dirty-logs'; there are: "),
    ],
)
def test_wrong_calls(cli, arguments, expected) -> None:
    code, out, said = cli("bench", "--accel", "kvm", *arguments)
    assert (code, out) == (2, "")
    assert expected in said


def test_list(cli) -> None:
    code, out, _ = cli("bench", "--accel", "kvm", "--list")
    assert code == 0
    for name in ("dirty-log", "idle-random", "bitmap", "manual", "ring", "raw"):
        assert f"  {name} " in out


def test_without_kvm(cli, tmp_path) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("KVM is here")
    code, _, said = cli("bench", "--accel", "kvm", "--quick")
    assert code == 7
    assert "accel kvm: " in said
