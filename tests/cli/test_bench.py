"""`sterna bench`: real migrations of small guests, and the report of recorded ones."""

import importlib.util
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tests.cli.vms import TIMEOUT, alive, children, interrupt, wait_for

from sterna.bench import ceiling, workloads
from sterna.bench.campaign import CampaignSettings, Comparison, Series, compare, guest_config
from sterna.bench.image import guest_image
from sterna.bench.migration import Measurement, RunOutcome, _Watched
from sterna.bench.report import print_report, to_json
from sterna.bench.summary import judge, summarise
from sterna.bench.workloads import MEBIBYTE, VARIANTS, WORKLOADS, Content, Load, Who, Workload
from sterna.guests.layout import WORK_OFFSET
from sterna.host.load import HostLoad, cpu_seconds
from sterna.launch.qemu import Qemu
from sterna.machine.board import BOARDS
from sterna.machine.loader import read_image
from sterna.memory.ram import RamBlock

pytestmark = pytest.mark.slow

COMMAND = [sys.executable, "-m", "sterna", "bench"]


def bench(*arguments: str, **environment: str) -> tuple[int, dict[str, Any], str]:
    done = subprocess.run(
        [*COMMAND, "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, **environment},
    )
    return done.returncode, json.loads(done.stdout), done.stderr


def never() -> None:
    """Nobody interrupts."""


# -- real ones -----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("qemu")
def test_quick_beside_qemu() -> None:
    code, result, said = bench("--quick", "--memory", "32M", "idle-random", "dirty-1g")
    assert code == 0
    assert "idle-random, run 1 of 1, qemu: " in said
    idle, dirty = result["workloads"]
    rows = {row["variant"]: row for row in idle["results"]}
    assert list(rows) == ["sterna", "qemu", "raw"]
    for row in rows.values():
        assert row["outcome"] == "completed"
        # All but the first 4 MiB is random, so that nothing but whole pages can carry it.
        assert row["median"]["bytes"] > 27 * MEBIBYTE
        assert row["median"]["seconds"] > 0
    assert rows["sterna"]["verified"] is True
    assert rows["qemu"]["verified"] is False
    assert [row["variant"] for row in dirty["results"]] == ["sterna", "qemu"]
    for row in dirty["results"]:
        # Page writes a second of a load that is bound by its sleeps, however fast its CPU.
        assert 0 < row["median"]["writes_before"] <= 1.2 * 13 / 0.030
        assert row["median"]["writes_during"] is not None  # it may take less than a sleep of the guest's
        assert row["median"]["guest_speed"] is not None
        assert row["median"]["throttle_percent"] is not None
        assert row["median"]["downtime_ms"] is not None
        assert row["each"][0]["host"]["cpus"] == os.cpu_count()
    assert rows["sterna"]["median"]["guest_speed"] is None  # it writes nothing
    assert dirty["guest"] == "dirtyram 1606 13 30"
    assert result["goals"] == []  # they are about guests of full size
    assert result["qemu"]["path"] == shutil.which("qemu-system-arm")
    assert result["qemu"]["version"] in subprocess.check_output(
        [result["qemu"]["path"], "--version"], text=True
    )


def test_pages_of_random_words_cannot_be_made_smaller() -> None:
    # Asked for: the policy would have pages sent whole where it takes a busy host too long to encode them.
    variant = ("--only", "sterna xbzrle")
    code, result, _ = bench("--quick", "--memory", "32M", *variant, "dirty-1g", "random-25-1g")
    assert code == 0
    [[seed], [random]] = (workload["results"] for workload in result["workloads"])
    assert [workload["guest"] for workload in result["workloads"]] == [
        "dirtyram 1606 13 30",
        "dirtyram 1606 3 30 511",
    ]
    assert random["verified"] is True
    assert random["median"]["bytes"] > 1606 * 4088 > 10 * seed["median"]["bytes"]


def test_alone_where_there_is_no_qemu(tmp_path: Path) -> None:
    code, result, said = bench("--quick", "--memory", "16M", "idle-zero", PATH=str(tmp_path))
    assert code == 0
    assert "qemu-system-arm is not installed: apt install qemu-system-arm; sterna is measured alone" in said
    assert result["qemu"] is None
    [row] = result["workloads"][0]["results"]
    assert row["variant"] == "sterna"
    assert row["median"]["bytes"] < MEBIBYTE  # nothing was read that the host has no memory for


def test_a_guest_that_outruns_the_channel_is_cancelled() -> None:
    # Its zero pages alone take eight seconds.
    slow = Workload("slow", "", 16 * MEBIBYTE, load=Load(500, 10, 5), bandwidth=4_000)
    notes: list[str] = []
    result = compare(slow, [VARIANTS["sterna"]], CampaignSettings(runs=3, timeout=0.3), never, notes.append)
    [series] = result.series
    # The third run would tell nothing new.
    assert [one.outcome for one in series.measurements] == [RunOutcome.DIVERGED] * 2
    assert notes[1].startswith("slow, run 2 of 3, sterna: did not converge; host meanwhile: ")
    assert summarise(series).outcome == "did not converge"
    # What its migration cost the guest is known all the same.
    assert all(one.guest_speed is not None for one in series.measurements)


def test_what_a_hypervisor_lacks_is_told_once() -> None:
    strange = workloads.Variant("strange", Who.STERNA, ("rdma-pin-all",))
    notes: list[str] = []
    small = Workload("small", "", 16 * MEBIBYTE)
    result = compare(small, [strange], CampaignSettings(runs=3), never, notes.append)
    assert result.series[0].measurements == []
    assert summarise(result.series[0]).outcome.startswith("not available: ")
    assert len(notes) == 1
    assert "rdma-pin-all" in notes[0]


def test_ctrl_c_leaves_no_process_behind() -> None:
    process = subprocess.Popen(
        [*COMMAND, "--memory", "64M", "--only", "sterna", "dirty-1g"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: len(children(process.pid)) == 2)
    guests = children(process.pid)
    interrupt(process)
    out, said = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 130
    assert out == ""
    assert said.endswith("sterna: error: interrupted\n")
    assert not any(alive(pid) for pid in guests)


@pytest.mark.parametrize("channels", [1, 2])
def test_ceiling(channels: int) -> None:
    measured = ceiling.measure_ceiling(8 * MEBIBYTE, channels, never)
    assert measured.bytes == 8 * MEBIBYTE
    assert measured.seconds > 0


def test_the_ceiling_moves_every_byte() -> None:
    here, there = socket.socketpair()
    with here, there, RamBlock("from", 3 * MEBIBYTE) as source, RamBlock("to", 3 * MEBIBYTE) as target:
        source.data[:] = np.random.default_rng(1).integers(0, 256, source.size, dtype=np.uint8)
        sender = threading.Thread(target=ceiling._send, args=(here, source.view))
        sender.start()
        ceiling._receive(there, target.view)
        sender.join(TIMEOUT)
        assert np.array_equal(source.data, target.data)


def test_an_interrupt_ends_the_ceiling() -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    before = children(os.getpid())  # other tests of this process may have some
    with pytest.raises(KeyboardInterrupt):
        ceiling.measure_ceiling(MEBIBYTE, 1, interrupted)
    assert not children(os.getpid()) - before


# -- their parts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", list(Content))
def test_image(content: Content) -> None:
    board, size = BOARDS.get("virt"), 16 * MEBIBYTE
    with guest_image("clock", "virt", int(board.ram_base), size, content) as path:
        image = read_image(Path(path), board, size, 1 << 16)
        with guest_image("clock", "virt", int(board.ram_base), size, Content.NONE) as shipped:
            program = read_image(Path(shipped), board, size, 1 << 16)
        assert image.entry == program.entry
        segments = [(one.ipa, bytes(one.data), one.size) for one in image.segments]
        assert segments[: len(program.segments)] == [
            (one.ipa, bytes(one.data), one.size) for one in program.segments
        ]
        added = segments[len(program.segments) :]
        if content is Content.NONE:
            assert not added
            return
        [(at, data, length)] = added
        assert at == board.ram_base + WORK_OFFSET
        assert len(data) == length == size - WORK_OFFSET
        pages = np.frombuffer(data, dtype=np.uint64).reshape(-1, 512)
        if content is Content.ZERO:
            assert not pages.any()
        else:
            assert len(np.unique(pages)) == pages.size
        del image, pages


def test_cpu_seconds_are_those_of_the_process() -> None:
    begun, before, started = time.process_time(), cpu_seconds(os.getpid()), time.process_time()
    while time.process_time() < started + 0.1:
        sum(range(1000))
    ending, after, ended = time.process_time(), cpu_seconds(os.getpid()), time.process_time()
    # The kernel counts in ticks of 10 ms, user and system apart.
    assert ending - started - 0.03 < after - before < ended - begun + 0.03


@pytest.mark.parametrize("workload", WORKLOADS.values(), ids=list(WORKLOADS))
@pytest.mark.parametrize("size", [None, 16 * MEBIBYTE, 1000 * MEBIBYTE])
def test_every_guest_can_be(workload: Workload, size: int | None) -> None:
    config = guest_config(workload, size)
    assert config.memory_bytes == (size or workload.memory_bytes)


def test_the_load_scales_with_memory() -> None:
    assert str(Load(102580, 812, 30).scaled(0.5)) == "51290 406 30"
    assert str(Load(10, 8, 5).scaled(0.001)) == "1 1 5"
    assert str(Load(102580, 183, 30, 511).scaled(0.5)) == "51290 92 30 511"


# -- the report ----------------------------------------------------------------------------------------------


def completed(seconds: float, **more: Any) -> Measurement:
    return Measurement(RunOutcome.COMPLETED, seconds, bytes=2 * 10**9, **more)


def recorded(name: str, **runs: list[Measurement]) -> Comparison:
    """A comparison with these runs, by variant (underscores for blanks)."""
    series = []
    for variant, measurements in runs.items():
        series.append(Series(VARIANTS[variant.replace("_", " ")], measurements))
    return Comparison(WORKLOADS[name], guest_config(WORKLOADS[name], None), tuple(series))


BUSY = HostLoad(2, 9.5, 0.75, 0.0, None)
IDLE = recorded(
    "idle-random",
    sterna=[completed(2.0), completed(1.0, verified=True), completed(8.0)],
    sterna_multifd=[completed(3.0)],
    qemu=[completed(9.0)],
    qemu_multifd=[completed(4.0)],
    raw=[completed(1.8)],
)
HARD = recorded(
    "hard-1g",
    sterna=[completed(10.0, verified=True, downtime_ms=250.0, predicted_ms=280.0, writes_before=1e6)],
    qemu=[Measurement(RunOutcome.DIVERGED, 60.0)] * 2,
    qemu_xbzrle=[Measurement(RunOutcome.FAILED, 1.0, error="the pipe is broken"), completed(1.0)],
)


def test_medians_of_what_completed() -> None:
    sterna = summarise(IDLE.series[0])
    assert (sterna.completed, sterna.medians["seconds"], sterna.throughput) == (3, 2.0, 1e9)
    assert sterna.medians["downtime_ms"] is None
    assert sterna.verified is False  # only one of them was
    qemu, xbzrle = (summarise(series) for series in HARD.series[1:])
    assert (qemu.runs, qemu.completed, qemu.medians["seconds"]) == (2, 0, None)
    assert qemu.outcome == "did not converge"
    # One that failed tells more than one that did not.
    assert xbzrle.outcome == "failed: the pipe is broken"


def test_goals_compare_the_best_of_each() -> None:
    summaries = {one.workload.name: [summarise(row) for row in one.series] for one in (IDLE, HARD)}
    ratio, share, limits, predicted = judge(summaries)
    assert ratio.measured == "2.00 x: sterna 2.00 s, qemu multifd 4.00 s"
    assert ratio.met is True
    assert share.measured == "90%: sterna 1.00 GB/s, raw 1.11 GB/s"
    assert share.met is True
    assert limits.measured == "sterna: 10.0 s, 250 ms"
    assert limits.met is True
    assert predicted.measured == "sterna: 280 ms for 250 ms"
    assert predicted.met is True


@pytest.mark.parametrize(
    ("runs", "met"),
    [
        ([completed(21.0, verified=True, downtime_ms=1.0)], False),
        ([completed(1.0, verified=True, downtime_ms=301.0)], False),
        ([completed(1.0, downtime_ms=1.0)], False),
        ([completed(1.0, verified=True)], False),
        ([Measurement(RunOutcome.DIVERGED, 60.0)], False),
        ([], None),
    ],
)
def test_goals_that_are_missed(runs: list[Measurement], met: bool | None) -> None:
    comparison = recorded("hard-1g", sterna=runs)
    limits = judge({"hard-1g": [summarise(row) for row in comparison.series]})[0]
    assert limits.met is met


THREE = CampaignSettings(runs=3)


def printed(width: int, *comparisons: Comparison, settings: CampaignSettings = THREE) -> str:
    console = Console(file=io.StringIO(), width=width)
    print_report(console, comparisons, settings)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_report() -> None:
    text = printed(110, IDLE, HARD, settings=CampaignSettings(runs=3, qemu=Qemu("/some/qemu", "10.0.2")))
    for expected in (
        "QEMU 10.0.2: /some/qemu",
        "idle-random: idle, random RAM, 2.00 GiB, no bandwidth limit; medians of 3",
        "hard-1g: dirtyram 409600 8192 5, 1.75 GiB, 125.0 MB/s; medians of 3",
        "qemu: did not converge",
        "qemu xbzrle: failed: the pipe is broken",
        "85 % of the raw ceiling",
        "writes/s",
        "met",
    ):
        assert expected in text
    assert max(map(len, text.splitlines())) <= 110


FIGURES = {
    "downtime_ms": 93.0, "predicted_ms": 101.0, "passes": 9, "source_cpu_s": 5.25, "destination_cpu_s": 1.5,
    "writes_before": 903456.0, "writes_during": 462345.0, "throttle_percent": 62,
}  # fmt: skip
FULL = recorded(
    "hard-1g",
    **{
        "sterna": [completed(6.0, verified=True, **FIGURES)],
        "sterna_multifd_unverified": [completed(6.5, **FIGURES)],
        "qemu_xbzrle_auto-converge": [completed(29.0, **FIGURES)],
    },
)
CELLS = ["29.00", "2.000", "0.07", "93", "101", "51", "62", "9", "5.25", "1.50", "903456", "462345"]


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 143, 200, 1000])
def test_tables_fit_and_nothing_is_cut(width: int) -> None:
    lines = printed(width, FULL, settings=CampaignSettings(memory_bytes=MEBIBYTE)).splitlines()[1:]
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    assert "…" not in text
    # Every figure of the last variant, in order, however its name is wrapped.
    rows = [line.split() for line in lines if line.startswith(" qemu")]
    assert [word for row in rows for word in row if word[0].isdigit()] == CELLS
    words = text.split()
    for title in (
        "time",
        "sent",
        "rate",
        "downtime",
        "predicted",
        "passes",
        "dest.",
        "meanwhile",
        "throttle",
    ):
        assert words.count(title) == 1
    assert (sum(line.startswith(" ─") for line in lines) == 1) == (width >= 143)


def test_columns_without_figures_are_left_out() -> None:
    text = printed(110, IDLE)
    assert "time" in text
    assert "throttle" not in text
    assert "writes/s" not in text


def test_what_did_not_converge_says_what_it_cost() -> None:
    diverged = Measurement(
        RunOutcome.DIVERGED, 60.0, writes_before=1e6, writes_during=1.2e5, throttle_percent=99, host=BUSY
    )
    text = printed(1000, recorded("hard-1g", qemu=[diverged]))
    assert f"qemu: did not converge; its guest ran at 12 % of its speed, throttled by 99 %; {BUSY}\n" in text


def test_goals_that_are_missed_say_how_busy_the_host_was() -> None:
    slow = completed(21.0, verified=True, downtime_ms=1.0, host=BUSY)
    calm = completed(21.0, verified=True, downtime_ms=1.0, host=HostLoad(2, 0.5, 0.0, 0.0, 0.0))
    told = f"hard-1g, at the busiest: {BUSY}\n"
    assert told in printed(1000, recorded("hard-1g", sterna=[calm, slow, calm]))
    met = completed(1.0, verified=True, downtime_ms=1.0, predicted_ms=1.0, host=BUSY)
    assert "at the busiest" not in printed(1000, recorded("hard-1g", sterna=[met]))


@pytest.mark.parametrize(
    ("expected", "predicted"),
    [([], None), ([300, 300], None), ([300, 120], 120), ([300, 120, 300], 300), ([7], 7)],
)
def test_the_limit_that_a_qemu_begins_with_predicts_nothing(
    expected: list[int], predicted: int | None
) -> None:
    watched = _Watched({})
    watched.note({}, 300)
    for ms in expected:
        watched.note({"expected-downtime": ms}, 300)
    assert watched.predicted_ms == predicted


def test_json_has_every_run() -> None:
    result = json.loads(json.dumps(to_json([IDLE, HARD], CampaignSettings(runs=3))))
    [idle, hard] = result["workloads"]
    assert [run["seconds"] for run in idle["results"][0]["each"]] == [2.0, 1.0, 8.0]
    assert hard["results"][1]["each"][0]["outcome"] == "did not converge"
    assert [goal["met"] for goal in result["goals"]] == [True] * 4


def figures() -> Any:
    """The program that makes README's table."""
    path = Path(__file__).parents[2] / "bench" / "figures.py"
    spec = importlib.util.spec_from_file_location("figures", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_the_readme() -> None:
    module = figures()
    slowed = completed(6.0, downtime_ms=93.0, writes_before=100.0, writes_during=51.0, throttle_percent=62)
    quick = completed(29.0, downtime_ms=1.0, writes_before=100.0, writes_during=80.0, throttle_percent=0)
    diverged = Measurement(RunOutcome.DIVERGED, 60.0)
    with_both = [
        recorded(name, sterna=[completed(1.0, downtime_ms=20.0)], qemu=[completed(0.5, downtime_ms=2.0)])
        for name in module.WORKLOADS
        if name != "hard-1g"
    ]
    hard = {
        "sterna": [slowed],
        "sterna_unthrottled": [diverged],
        "qemu": [diverged],
        "qemu_xbzrle": [quick],
        "qemu_multifd": [diverged],
    }
    qemu = Qemu("/some/qemu", "7.2.22")
    result = to_json([*with_both, recorded("hard-1g", **hard)], CampaignSettings(runs=1, qemu=qemu))
    lines = module.table([result, result | {"qemu": {"path": "/other", "version": "11.1.3"}}]).splitlines()
    assert lines[0] == "| guest | sterna | QEMU 7.2.22 | QEMU 11.1.3 |"
    assert len(lines) == 2 + len(module.WORKLOADS)
    idle = "0.5 s, 2 ms, 2.0 GB"
    assert lines[2] == f"| idle, RAM never touched | 1 s, 20 ms, 2.0 GB | {idle} | {idle} |"
    other = "not within a minute; xbzrle 29 s, 1 ms, 2.0 GB, guest 80 %"
    sterna = "6 s, 93 ms, 2.0 GB, guest 51 % (throttled by 62 %); unthrottled not within a minute"
    assert lines[-1] == f"| `dirtyram 409600 8192 5`, 1 Gbit/s | {sterna} | {other} | {other} |"
    # It has its place in README.
    assert len(module._TABLE.findall(module.README.read_text())) == 1


# -- the command ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("nothing",), "no workload 'nothing'; there are: idle-random, "),
        (("--only", "nobody"), "no variant 'nobody'; there are: sterna, "),
        (("--memory", "much"), "'much' is not a size"),
        (("--memory", "0"), "0 bytes is not a size of RAM"),
        (("--memory", "4M"), "4194304 bytes of memory are too few"),
        (("--memory", "1T"), "too much for board virt"),
        (("--runs", "0"), "0 is not in the range 1<=x<=100"),
        (("--timeout", "0"), "0.0 is not in the range"),
        (("--only", "raw", "dirty"), "none of these variants is measured with these workloads"),
        (("--qemu", "/nowhere/qemu"), "--qemu: /nowhere/qemu is not installed"),
        (("--qemu", "true", "--only", "sterna"), "true does not tell that it is a QEMU: "),
        (("--qemu", "true", "--accel", "kvm"), "--qemu: no QEMU is measured beside --accel kvm"),
    ],
)
def test_wrong_calls(cli, arguments: tuple[str, ...], expected: str) -> None:
    code, out, said = cli("bench", *arguments)
    assert code == 2
    assert out == ""
    assert expected in said


def test_list(cli) -> None:
    code, out, _ = cli("bench", "--list")
    assert code == 0
    for name in [*WORKLOADS, *VARIANTS]:
        assert f"  {name} " in out
