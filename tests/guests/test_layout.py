"""Status pages that are not: they come from a guest, and are not believed."""

import re

import numpy as np
import pytest

from sterna.guests.build import SOURCES
from sterna.guests.check import check_ram
from sterna.guests.layout import (
    CPU_RECORD,
    STATUS,
    STATUS_MAGIC,
    STATUS_OFFSET,
    STATUS_VERSION,
    ClockWord,
    CpuState,
    DirtyramWord,
    ErrorCode,
    GuestState,
    NetWord,
    ProgramId,
    RandomError,
    RandomWord,
    StatusError,
    read_status,
    read_status_of_ram,
)

HEADER = (SOURCES / "status.h").read_text()


def test_fields_are_where_the_header_has_them() -> None:
    for name, dtype in (("cpu_record", CPU_RECORD), ("status", STATUS)):
        body = re.search(rf"^struct {name} \{{(.*?)^\}};", HEADER, re.MULTILINE | re.DOTALL)
        assert body
        fields = re.findall(
            r"^\t(?:uint\d+_t|char|struct \w+) (\w+)(?:\[\w+\])?;(?:\s*/\* (0x[0-9a-f]+))?",
            body[1],
            re.MULTILINE,
        )
        assert [field for field, _ in fields] == list(dtype.names or ())
        for field, offset in fields:
            if offset:
                assert dtype.fields is not None
                assert dtype.fields[field][1] == int(offset, 16), field


@pytest.mark.parametrize(
    ("prefix", "enum"),
    [
        ("PROGRAM_", ProgramId),
        ("STATE_", GuestState),
        ("CPU_", CpuState),
        ("ERROR_", ErrorCode),
        ("DIRTYRAM_", DirtyramWord),
        ("CLOCK_", ClockWord),
        ("NET_", NetWord),
    ],
)
def test_numbers_are_those_of_the_header(prefix: str, enum: type) -> None:
    found = {name: int(value) for name, value in re.findall(rf"\b{prefix}(\w+) = (\d+)", HEADER)}
    assert found == {member.name: member.value for member in enum}  # type: ignore[attr-defined]


def test_numbers_of_random_are_those_of_the_header() -> None:
    found = {name: int(value) for name, value in re.findall(r"\bRANDOM_(\w+) = (\d+)", HEADER)}
    expected = {member.name: member.value for member in (*RandomWord, *RandomError)}
    del expected["NONE"]
    assert found == expected


def status_page() -> np.ndarray:  # type: ignore[type-arg]
    page = np.zeros(1, dtype=STATUS)
    page["magic"], page["version"], page["program"] = STATUS_MAGIC, STATUS_VERSION, ProgramId.DIRTYRAM
    page["state"], page["cpus"], page["frequency"] = GuestState.RUNNING, 2, 62_500_000
    return page


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("magic", 0, "its magic is 0x0000000000000000"),
        ("version", 9, "version 9"),
        ("program", 0, r"unknown program \(0\), or it has not started"),
        ("state", 3, "state 3"),
        ("error", 99, "error 99"),
        ("cpus", 5, "5 CPUs"),
        ("frequency", 0, "frequency of 0"),
    ],
)
def test_damaged_pages_are_refused(field: str, value: int, text: str) -> None:
    page = status_page()
    assert read_status(page.view(np.uint8)).cpus == 2
    page[field] = value
    with pytest.raises(StatusError, match=text):
        read_status(page.tobytes())


def test_short_pages_and_small_ram_are_refused() -> None:
    with pytest.raises(StatusError, match="4096 bytes, not 4095"):
        read_status(status_page().tobytes()[:-1])
    with pytest.raises(StatusError, match="ends before the status page"):
        read_status_of_ram(np.zeros(STATUS_OFFSET, dtype=np.uint8))
    assert check_ram(np.zeros(8 << 20, dtype=np.uint8)) == [
        "no guest program's status page: its magic is 0x0000000000000000, not 0x53455547414e5453"
    ]


def test_the_ring_gives_the_latest_gaps_in_order() -> None:
    page = status_page()
    cpu = page["cpu"][0][1]
    cpu["long_gaps"] = 11
    for number in range(11):
        cpu["gaps"][number % 8] = (1000 * number, 625_000 + number)
    status = read_status(page.tobytes())
    assert [gap.start for gap in status.gaps_since(1)] == [3000, 4000, 5000, 6000, 7000, 8000, 9000, 10000]
    late = status.gaps_since(1, counter=9500)
    assert [(gap.start, gap.ticks, round(gap.milliseconds, 3)) for gap in late] == [(10000, 625_010, 10.0)]
    assert status.gaps_since(0) == []
    with pytest.raises(IndexError, match="CPU 2 takes no part"):
        status.cpu(2)


@pytest.mark.parametrize("program", [ProgramId.DIRTYRAM, ProgramId.RANDOM])
@pytest.mark.parametrize("garbage", range(8))
def test_shares_outside_ram_are_told(program: ProgramId, garbage: int) -> None:
    page = status_page()
    page["program"] = program
    page["cpu"]["state"] = CpuState.RUNNING
    words = np.random.default_rng(garbage).integers(0, 1 << 64, size=16, dtype=np.uint64)
    page["cpu"]["words"] = words >> np.uint64(garbage * 7)
    page["cpu"]["words"][0][1][int(RandomWord.ERRORS)] = 0
    ram = np.zeros(8 << 20, dtype=np.uint8)
    ram[STATUS_OFFSET : STATUS_OFFSET + 4096] = page.view(np.uint8)
    problems = check_ram(ram)
    assert any("outside RAM" in problem for problem in problems)
