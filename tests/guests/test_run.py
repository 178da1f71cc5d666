"""The programs run under QEMU, on each board, alone and with two CPUs, and what they leave in RAM checks out."""

import re

import numpy as np
import pytest

from sterna.guests.check import _random_words, check_dirtyram, check_ram, check_random
from sterna.guests.layout import (
    STATUS,
    STATUS_OFFSET,
    WORK_OFFSET,
    BoardId,
    CpuState,
    DirtyramWord,
    ErrorCode,
    GuestState,
    ProgramId,
    RandomError,
    RandomWord,
    Status,
    read_status_of_ram,
)

from .conftest import RAM_BASE, Launch

BOARDS = pytest.mark.parametrize("board", ["virt", "vexpress-a15", "virt-arm64"])
CPUS = pytest.mark.parametrize("cpus", [1, 2])
CODE_BYTES = 0x8000
"""No image is larger."""


def check_machine(status: Status, program: ProgramId, board: str, cpus: int) -> None:
    assert status.program is program
    assert status.state is GuestState.RUNNING
    assert int(status.record["board"]) == BoardId[board.upper().replace("-", "_")]
    assert int(status.record["ram_base"]) == RAM_BASE[board]
    assert int(status.record["ram_bytes"]) == 64 << 20
    assert int(status.record["work_pages"]) == (60 << 20) // 4096
    assert status.cpus == cpus
    for cpu in range(cpus):
        assert int(status.cpu(cpu)["state"]) == CpuState.RUNNING
        assert int(status.cpu(cpu)["mpidr"]) & 0xFFFFFF == cpu
    for record in status.record["cpu"][cpus:]:
        assert int(record["state"]) == CpuState.OFF
    assert status.backward_steps() == 0


@BOARDS
@CPUS
def test_dirtyram(launch: Launch, board: str, cpus: int) -> None:
    guest = launch("dirtyram", "2001 300 1", board, cpus)
    guest.wait_for_text("touched all pages")
    # Some passes, each with a front at some place in the middle.
    guest.wait_for(lambda s: all(s.word(cpu, DirtyramWord.PASSES) > 3 for cpu in range(cpus)))
    ram = guest.stopped_ram()
    status = read_status_of_ram(ram)
    check_machine(status, ProgramId.DIRTYRAM, board, cpus)
    assert status.args[:3] == (2001, 300, 1)
    assert status.bootargs == "2001 300 1"
    assert sum(status.word(cpu, DirtyramWord.PAGES) for cpu in range(cpus)) == 2001
    assert sum(status.word(cpu, DirtyramWord.PER_STEP) for cpu in range(cpus)) == 300
    assert check_ram(ram) == []
    # Nothing beyond the pages asked for.
    assert not ram[WORK_OFFSET + 2001 * 4096 :].any()
    first_words = ram[WORK_OFFSET : WORK_OFFSET + 2001 * 4096].view(np.uint32).reshape(2001, -1)
    assert first_words[:, 0].all()
    assert not first_words[:, 1:].any()


def test_dirtyram_check_finds_a_stale_page(launch: Launch) -> None:
    guest = launch("dirtyram", "1000 100 1", cpus=2)
    guest.wait_for(lambda s: s.word(0, DirtyramWord.PASSES) > 2 < s.word(1, DirtyramWord.PASSES))
    ram = guest.stopped_ram()
    status = read_status_of_ram(ram)
    assert check_dirtyram(ram, status) == []
    for page in (0, 499, 500, 999):
        cpu, share_page = divmod(page, 500)
        word = ram[WORK_OFFSET + page * 4096 :][:4].view(np.uint32)
        fresh = word.copy()
        word -= 500  # what the pass before had written
        (problem,) = check_dirtyram(ram, status)
        assert f"cpu {cpu}, " in problem
        assert f"page {share_page} of its share (RAM offset {WORK_OFFSET + page * 4096:#x})" in problem
        assert f"holds {fresh[0] - 500}, not {fresh[0]}" in problem
        word[:] = fresh
    ram[WORK_OFFSET : WORK_OFFSET + 1000 * 4096] = 0
    problems = check_dirtyram(ram, status)
    assert len(problems) == 18
    assert problems[8].endswith("and 492 more pages")


@BOARDS
@CPUS
def test_dirtyram_of_random_words(launch: Launch, board: str, cpus: int) -> None:
    guest = launch("dirtyram", "501 100 1 300", board, cpus)
    guest.wait_for(lambda s: all(s.word(cpu, DirtyramWord.PASSES) > 2 for cpu in range(cpus)))
    ram = guest.stopped_ram()
    status = read_status_of_ram(ram)
    assert check_ram(ram) == []
    words = ram[WORK_OFFSET : WORK_OFFSET + 501 * 4096].view(np.uint64).reshape(501, -1)
    assert not words[:, 301:].any()
    # No word of a page is another's: nothing that is sent of it can be left out.
    assert all(len(np.unique(page)) == 300 for page in words[:, 1:301])
    for page, word in ((0, 1), (250, 300), (500, 300)):
        words[page, word] ^= np.uint64(1 << 40)
        (problem,) = check_dirtyram(ram, status)
        assert f"(RAM offset {WORK_OFFSET + page * 4096:#x}) has other random words than write " in problem
        words[page, word] ^= np.uint64(1 << 40)


def test_dirtyram_may_be_stopped_within_a_page(launch: Launch) -> None:
    guest = launch("dirtyram", "100 10 1 511")
    guest.wait_for(lambda s: s.word(0, DirtyramWord.PASSES) > 1)
    ram = guest.stopped_ram()
    status = read_status_of_ram(ram)
    writes = status.word(0, DirtyramWord.WRITES)
    words = ram[WORK_OFFSET : WORK_OFFSET + 100 * 4096].view(np.uint64).reshape(100, -1)
    # Half of the next write: what it has put so far goes with the rest of the page's latest.
    new = list(_random_words(np.array([writes + 1], dtype=np.uint64), 511))
    page = words[writes % 100]
    page[0] = writes + 1
    page[1:257] = np.concatenate(new[:256])
    assert check_dirtyram(ram, status) == []
    page[400] += np.uint64(1)
    (problem,) = check_dirtyram(ram, status)
    assert "has other random words" in problem
    ram[STATUS_OFFSET : STATUS_OFFSET + 4096].view(STATUS)["args"][0][3] = 512
    assert check_ram(ram) == ["cpu 0: 512 random words are more than a page has"]


@BOARDS
@CPUS
def test_clock(launch: Launch, board: str, cpus: int) -> None:
    guest = launch("clock", "20", board, cpus)
    text = guest.wait_for_text("seq 6")
    guest.qmp("stop")
    status = guest.status()
    check_machine(status, ProgramId.CLOCK, board, cpus)
    assert status.frequency == 62_500_000
    lines = re.findall(
        r"clock: (\d\d):(\d\d):(\d\d)\.(\d{3}) seq (\d+) largest gap \d+\.\d{3} ms backward 0\r\n", text
    )
    assert [int(line[4]) for line in lines[:5]] == [1, 2, 3, 4, 5]
    times = [int(h) * 3600_000 + int(m) * 60_000 + int(s) * 1000 + int(ms) for h, m, s, ms, _ in lines]
    # One that comes late does not put off the next, which may come in the same ms.
    assert times == sorted(times)
    assert times[-1] - times[0] >= 20 * (len(times) - 1) - 21
    assert all(int(status.cpu(cpu)["steps"]) > 0 for cpu in range(cpus))


def test_a_gap_can_be_told_from_those_before(launch: Launch) -> None:
    guest = launch("clock", "5", cpus=2)
    before = guest.wait_for(lambda s: all(int(s.cpu(cpu)["steps"]) > 4 for cpu in range(2)))
    counters = [int(before.cpu(cpu)["last_counter"]) for cpu in range(2)]
    # Longer than those before: on a busy host later ones may take its place among the latest, and it is the largest.
    guest.freeze(round(50 + 2 * before.largest_gap().milliseconds))

    def told(s: Status, cpu: int) -> bool:
        record, later = s.cpu(cpu), s.gaps_since(cpu, counters[cpu])
        largest = int(record["largest_gap_start"]) >= counters[cpu] and int(record["largest_gap"])
        return s.milliseconds(largest) >= 40 and (
            any(gap.milliseconds >= 40 for gap in later) or len(later) == 8
        )

    status = guest.wait_for(lambda s: all(told(s, cpu) for cpu in range(2)))
    for cpu in range(2):
        record = status.cpu(cpu)
        gaps = status.gaps_since(cpu)
        assert len(gaps) == min(8, int(record["long_gaps"]))
        assert all(gap.ticks > int(status.record["long_gap_ticks"]) for gap in gaps)
        assert [gap.start for gap in gaps] == sorted(gap.start for gap in gaps)
        assert int(record["largest_gap"]) >= max(gap.ticks for gap in gaps)


@BOARDS
@CPUS
def test_random(launch: Launch, board: str, cpus: int) -> None:
    guest = launch("random", "0x1234 300 64", board, cpus)
    guest.wait_for(
        lambda s: all(s.word(cpu, RandomWord.SWEEPS) > 3 for cpu in range(cpus)) and s.cpus == cpus
    )
    ram = guest.stopped_ram()
    status = read_status_of_ram(ram)
    check_machine(status, ProgramId.RANDOM, board, cpus)
    assert status.args[:4] == (0x1234, 300, 64, 0)
    assert sum(status.word(cpu, RandomWord.ERRORS) for cpu in range(cpus)) == 0
    assert check_ram(ram) == []
    assert not ram[WORK_OFFSET + 300 * 4096 :].any()


def test_random_check_finds_a_stale_page(launch: Launch) -> None:
    guest = launch("random", "7 200 64", cpus=2)
    guest.wait_for(lambda s: s.word(1, RandomWord.SWEEPS) > 0)
    old = guest.stopped_ram()
    steps = [read_status_of_ram(old).word(cpu, RandomWord.STEPS) for cpu in range(2)]
    guest.qmp("cont")
    guest.wait_for(lambda s: all(s.word(cpu, RandomWord.STEPS) > steps[cpu] + 2000 for cpu in range(2)))
    ram = guest.stopped_ram()
    status = read_status_of_ram(ram)
    assert check_random(ram, status) == []
    changed = [page for page in range(200) if (page_of(old, page) != page_of(ram, page)).any()]
    assert len(changed) > 190
    for page in (changed[0], changed[1], changed[100], changed[-1]):
        fresh = page_of(ram, page).copy()
        page_of(ram, page)[:] = page_of(old, page)
        assert check_random(ram, status), f"page {page} is stale"
        page_of(ram, page)[:] = fresh
    one_bit = page_of(ram, 150)
    one_bit[4095] ^= 0x80
    (problem,) = check_random(ram, status)
    assert f"RAM offset {WORK_OFFSET + 150 * 4096:#x}" in problem


def page_of(ram: np.ndarray, page: int) -> np.ndarray:  # type: ignore[type-arg]
    return ram[WORK_OFFSET + page * 4096 : WORK_OFFSET + (page + 1) * 4096]


def test_random_tells_a_lost_page_itself(launch: Launch) -> None:
    guest = launch("random", "3 100 16 500")
    guest.wait_for_text("random: ERROR: steps")
    # Once by the tag when the page is next written, once by the sum of all pages, and never again.
    status = guest.wait_for(lambda s: s.word(0, RandomWord.ERRORS) == 2)
    sweeps = status.word(0, RandomWord.SWEEPS)
    status = guest.wait_for(lambda s: s.word(0, RandomWord.SWEEPS) > sweeps + 4)
    assert status.word(0, RandomWord.ERRORS) == 2
    problems = check_ram(guest.stopped_ram())
    assert any("the guest itself found 2 errors" in problem for problem in problems)


def test_random_tells_a_page_rolled_back_under_it(launch: Launch) -> None:
    guest = launch("random", "5 100 16")
    guest.wait_for(lambda s: s.word(0, RandomWord.SWEEPS) > 0)
    old = page_of(guest.stopped_ram(), 50).copy()
    guest.qmp("cont")
    steps = guest.status().word(0, RandomWord.STEPS)
    guest.wait_for(lambda s: s.word(0, RandomWord.STEPS) > steps + 2000)
    guest.poke(WORK_OFFSET + 50 * 4096, old[:16].tobytes())
    status = guest.wait_for(lambda s: s.word(0, RandomWord.ERRORS) > 0)
    assert status.word(0, RandomWord.ERROR_KIND) in (RandomError.STALE_PAGE, RandomError.SUM)


def test_random_tells_a_stale_status_page(launch: Launch) -> None:
    guest = launch("random", "5 100 16")
    old = guest.wait_for(lambda s: s.word(0, RandomWord.STEPS) > 100).word(0, RandomWord.STEPS)
    where = STATUS_OFFSET + 0x400 + 0x80 + 8 * RandomWord.STEPS
    # The guest sleeps nearly all the time, between two looks at its registers; should it be at work, try again.
    for _ in range(20):
        guest.poke(where, old.to_bytes(8, "little"))
        ticks = int(guest.status().cpu(0)["steps"])
        status = guest.wait_for(lambda s, ticks=ticks: int(s.cpu(0)["steps"]) > ticks + 1)  # type: ignore[misc]
        if status.word(0, RandomWord.ERRORS):
            break
    assert status.word(0, RandomWord.ERROR_KIND) == RandomError.REGISTERS


@pytest.mark.parametrize(
    ("program", "append", "error", "text"),
    [
        ("dirtyram", "1 2", ErrorCode.ARGUMENT_COUNT, "too few arguments"),
        ("dirtyram", "1 2 3 4 5", ErrorCode.ARGUMENT_COUNT, "too many arguments"),
        ("dirtyram", "8 8 3 512", ErrorCode.ARGUMENT_RANGE, "WORDS must be 0 to 511"),
        ("dirtyram", "12 x3 4", ErrorCode.ARGUMENT_NUMBER, "not a number"),
        ("dirtyram", "12 -3 4", ErrorCode.ARGUMENT_NUMBER, "not a number"),
        ("dirtyram", "10 0x 4", ErrorCode.ARGUMENT_NUMBER, "not a number"),
        ("dirtyram", "99999999999999999999 1 1", ErrorCode.ARGUMENT_NUMBER, "too many digits"),
        ("dirtyram", "9999999999999999999 1 1", ErrorCode.MEMORY, "PAGES is more than RAM has"),
        ("dirtyram", "15361 1 1", ErrorCode.MEMORY, "PAGES is more than RAM has"),
        ("dirtyram", "100 101 1", ErrorCode.ARGUMENT_RANGE, "PAGES_PER_STEP must be"),
        ("dirtyram", "0 1 1", ErrorCode.ARGUMENT_RANGE, "PAGES must be at least"),
        ("clock", "0", ErrorCode.ARGUMENT_RANGE, "PERIOD_MS must be"),
        ("random", "1 1", ErrorCode.ARGUMENT_RANGE, "PAGES must be at least twice"),
        ("random", "1 15361", ErrorCode.MEMORY, "PAGES is more than RAM has"),
        ("random", "1 100 0", ErrorCode.ARGUMENT_RANGE, "STEPS_PER_MS must be"),
    ],
)
def test_bad_arguments_are_told_and_stop_the_guest(
    launch: Launch, program: str, append: str, error: ErrorCode, text: str
) -> None:
    guest = launch(program, append)
    said = guest.wait_for_text("usage: ")
    assert f"{program}: error: " in said
    assert text in said
    status = guest.status()
    assert status.state is GuestState.ERROR
    assert status.error is error
    assert check_ram(guest.stopped_ram()) == [f"{program} stopped: {error.name}"]


def test_all_of_ram_can_be_used(launch: Launch) -> None:
    guest = launch("dirtyram", "15360 15360 0", cpus=4)
    guest.wait_for_text("touched all pages")
    ram = guest.stopped_ram()
    assert check_ram(ram) == []
    assert ram[-4096:-4092].any()


def test_defaults_without_a_device_tree(launch: Launch) -> None:
    guest = launch("dirtyram", board="vexpress-a15", memory_bytes=128 << 20, tree=False)
    guest.wait_for_text("touched all pages")
    status = guest.status()
    assert status.args[:3] == (4096, 64, 10)
    assert int(status.record["ram_bytes"]) == 128 << 20
    assert int(status.record["device_tree_bytes"]) == 0
    assert status.cpus == 1


@pytest.mark.parametrize(
    ("board", "mask", "read_counter", "undefined", "vector"),
    [
        ("virt", 0xFFF00FFF, 0xEC500F1E, 0xE7F000F0, 0x4),  # mrrc p15, 1, rX, rY, c14
        ("virt-arm64", 0xFFFFFFE0, 0xD53BE040, 0, 0x200),  # mrs xN, cntvct_el0
    ],
)
def test_an_exception_is_told(
    launch: Launch, board: str, mask: int, read_counter: int, undefined: int, vector: int
) -> None:
    guest = launch("clock", "1", board)
    guest.wait_for_text("seq 2")
    # The instructions that read the counter, made undefined ones. Code follows the status page.
    code = guest.stopped_ram()[STATUS_OFFSET + 4096 : STATUS_OFFSET + CODE_BYTES].view(np.uint32)
    places = [STATUS_OFFSET + 4096 + 4 * int(place) for place in np.flatnonzero(code & mask == read_counter)]
    assert places, "no such instruction in the image"
    for place in places:
        guest.poke(place, undefined.to_bytes(4, "little"))
    guest.wait_for_text(f"clock: error: exception at vector 0x{vector:08x}, cpu 0, pc 0x")
    said = guest.wait_for_text(", status 0x")
    pc = int(said.partition(", pc ")[2].partition(",")[0], 16)
    assert pc - RAM_BASE[board] in places
    assert check_ram(guest.stopped_ram()) == [
        "clock stopped: EXCEPTION",
        f"cpu 0 took the exception of vector {vector:#x} at pc {pc:#x}, address {0:#x}",
    ]
