"""Arguments are checked on the host as the guests check them."""

import pytest

from sterna.guests import PROGRAMS, GuestError, validate

MIB = 1 << 20


def test_usage() -> None:
    assert PROGRAMS["dirtyram"].usage == "dirtyram PAGES PAGES_PER_STEP SLEEP_MS [WORDS]"
    assert PROGRAMS["clock"].usage == "clock [PERIOD_MS]"
    assert PROGRAMS["net"].usage == "net ADDRESS [PAGES [PAGES_PER_MS]]"
    assert PROGRAMS["random"].usage == "random [SEED [PAGES [STEPS_PER_MS]]]"


@pytest.mark.parametrize(
    ("name", "append", "values"),
    [
        ("dirtyram", "", (4096, 64, 10, 0)),
        ("dirtyram", "102580 812 30", (102580, 812, 30, 0)),
        ("dirtyram", "  409600\t8192  5 ", (409600, 8192, 5, 0)),
        ("dirtyram", "0x10 010 0X0", (16, 10, 0, 0)),
        ("dirtyram", "102580 513 30 511", (102580, 513, 30, 511)),
        ("clock", "", (1000,)),
        ("random", "0xffffffffffffffff", (2**64 - 1, 4096, 16, 0)),
        ("random", "1 20 30", (1, 20, 30, 0)),
        ("net", "10.83.9.1", (0x0A53_0901, 0, 1)),
        ("net", "255.255.255.255 4 4096", (0xFFFF_FFFF, 4, 4096)),
    ],
)
def test_good_arguments(name: str, append: str, values: tuple[int, ...]) -> None:
    assert validate(name, append, cpus=4, memory_bytes=1792 * MIB) == values


@pytest.mark.parametrize(
    ("name", "append", "text"),
    [
        ("dirtyrom", "", "no guest program 'dirtyrom'"),
        ("dirtyram", "1 2", "2 arguments given"),
        ("dirtyram", "1 2 3 4 5", "5 arguments given"),
        ("dirtyram", "8 8 3 512", "WORDS is 512; it must be at least 0 and at most 511"),
        ("dirtyram", "1 2 x", "SLEEP_MS is 'x'"),
        ("dirtyram", "1 2 -3", "SLEEP_MS is '-3'"),
        ("dirtyram", "1_0 2 3", "PAGES is '1_0'"),
        ("dirtyram", "\u0663 2 3", "PAGES is '\u0663'"),
        ("dirtyram", "99999999999999999999 2 3", "PAGES is '9999"),
        ("dirtyram", "0 1 1", "PAGES is 0; it must be at least 1"),
        ("dirtyram", "15361 1 1", "have room for 15360; the first 4 MiB are the program's own"),
        ("dirtyram", "3 1 1", "with 4 CPUs it must be at least 4"),
        ("dirtyram", "8 9 1", "PAGES_PER_STEP is 9, more than PAGES, which is 8"),
        ("dirtyram", "8 8 3600001", "at most 3600000"),
        ("clock", "0", "PERIOD_MS is 0"),
        ("clock", "1\n", "PERIOD_MS is '1\\n'"),
        ("net", "", "needs its IPv4 address, such as --append 10.83.9.1"),
        ("net", "10.83.9", "ADDRESS is '10.83.9', not an IPv4 address such as 10.83.9.1"),
        ("net", "10.83.9.256", "ADDRESS is '10.83.9.256'"),
        ("net", "10.83.9.1.2", "ADDRESS is '10.83.9.1.2'"),
        ("net", "1 2", "ADDRESS is '1'"),
        ("net", "10.83.9.1 3", "with 4 CPUs it must be at least 4"),
        ("net", "10.83.9.1 99999", "have room for 15360"),
        ("net", "10.83.9.1 4 0", "PAGES_PER_MS is 0"),
        ("random", "1 7", "with 4 CPUs it must be at least 8"),
        ("random", "1 99999", "have room for 15360"),
        ("random", "1 100 4097", "at most 4096"),
    ],
)
def test_bad_arguments(name: str, append: str, text: str) -> None:
    with pytest.raises(GuestError) as raised:
        validate(name, append, cpus=4, memory_bytes=64 * MIB)
    assert text in str(raised.value)


def test_too_little_memory() -> None:
    with pytest.raises(GuestError, match="4194304 bytes of memory are too few"):
        validate("clock", "", memory_bytes=4 * MIB)
