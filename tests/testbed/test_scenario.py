"""Scenario files: strict, and every error says where."""

import os
from pathlib import Path

import pytest

from sterna.testbed import scenario
from sterna.testbed.checks.outcome import DowntimeCheck
from sterna.testbed.errors import ScenarioError
from sterna.testbed.kinds import VM_KINDS

GOOD = """
title = "a test"

[vm]
memory = "32M"

[procedure]
kind = "migrate"

[[check]]
kind = "completed"

[[check]]
kind = "downtime"
limit-ms = 100

[reduced.vm]
memory = "16M"

[for.qemu.vm]
smp = 2
"""


def test_variants_are_laid_over() -> None:
    file = scenario.parse("x", "x.toml", GOOD)
    plain = file.scenario("emulated")
    assert (plain.vm.memory_bytes, plain.vm.smp) == (32 << 20, 1)
    assert file.scenario("emulated", reduced=True).vm.memory_bytes == 16 << 20
    both = file.scenario("qemu", reduced=True)
    assert (both.vm.memory_bytes, both.vm.smp) == (16 << 20, 2)
    assert plain.check[1] == DowntimeCheck(limit_ms=100)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('memory = "32M"', 'memory = "32M"\nmemroy = 1', r"vm\.memroy: unknown key"),
        ('memory = "32M"', "memory = 32", r"vm\.memory: Expected `str`, got `int`"),
        ('memory = "32M"', 'memory = "32Q"', r"vm.*'32Q' is not a size"),
        ('title = "a test"', "", "missing required field `title`"),
        ('title = "a test"', 'title = "a test"\nextra = 1', "extra: unknown key"),
        (
            'kind = "migrate"',
            'kind = "migrat"',
            "procedure.*Invalid value 'migrat'; there are cancel, failover, faults, many, migrate, reclaim, ssh$",
        ),
        ('kind = "migrate"', 'kind = "migrate"\ntimes = 0', r"procedure\.times: Expected `int` >= 1"),
        ('kind = "migrate"', 'kind = "migrate"\ndwell-s = nan', r"procedure\.dwell-s: Expected `float`"),
        ('kind = "migrate"', 'kind = "migrate"\ndwell-s = inf', r"procedure\.dwell-s: Expected `float`"),
        (
            'kind = "migrate"',
            'kind = "many"\ncounts = []',
            r"procedure\.counts: Expected `array` of length >= 1",
        ),
        ('kind = "migrate"', 'kind = "many"\ncounts = [0]', r"procedure\.counts.*Expected `int` >= 1"),
        ('kind = "migrate"', 'kind = "cancel"\npoints = [-1.0]', r"procedure\.points.*Expected `float` > 0"),
        ('kind = "migrate"', 'kind = "faults"\ncases = []', r"procedure\.cases.*length >= 1"),
        ("smp = 2", "smp = 0", r"vm\.smp: Expected `int` >= 1"),
        ("limit-ms = 100", "limit-ms = -1", r"limit-ms: Expected `float` >= 0"),
        ('kind = "migrate"', 'kind = "migrate"\ntimes = "2"', r"procedure\.times: Expected `int`"),
        ('kind = "completed"', 'kind = "complete"', r"check.*Invalid value 'complete'.*audit.*completed"),
        ("limit-ms = 100", "limit-ms = 100\nlimit = 1", r"check.*limit: unknown key"),
        ("[reduced.vm]", "[reduced.wm]", "wm: unknown key"),
        ("[for.qemu.vm]", "[for.qume.vm]", r"for\.qume: no such kind"),
        ("smp = 2", "smp = []", r"vm\.smp: Expected `int`, got `array`"),
        ("[vm]", "[vm", "not TOML"),
        ("[vm]", '[network]\nrate = "1Gbot"\n[vm]', "network.*Gbot"),
    ],
)
def test_an_error_names_the_key(old: str, new: str, told: str) -> None:
    assert old in GOOD
    with pytest.raises(ScenarioError, match=told) as raised:
        scenario.parse("x", "x.toml", GOOD.replace(old, new, 1))
    assert str(raised.value).startswith("x.toml: ")
    assert "\n" not in str(raised.value)


def test_without_checks_it_shows_nothing() -> None:
    with pytest.raises(ScenarioError, match="at least one"):
        scenario.parse("x", "x.toml", GOOD.partition("[[check]]")[0])


def test_all_that_ship_are_good_for_every_kind() -> None:
    names = [file.name for file in scenario.find_all("all")]
    assert names
    assert len(names) == len(set(names))
    for file in scenario.find_all("all"):
        for kind in VM_KINDS:
            assert file.scenario(kind, reduced=True).title


def test_what_may_never_end_is_no_scenario(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.toml")
    for path in (tmp_path / "fifo.toml", Path("/dev/zero"), tmp_path):
        with pytest.raises(ScenarioError, match="it is no regular file, so no scenario"):
            scenario.find(f"{path}")


def test_a_file_of_the_users_own(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(GOOD)
    assert scenario.find(str(path)).name == "own"
    path.write_bytes(b"\xff")
    with pytest.raises(ScenarioError, match=r"own\.toml"):
        scenario.find(str(path))
    with pytest.raises(ScenarioError, match="No such file"):
        scenario.find(str(tmp_path / "none.toml"))
    with pytest.raises(ScenarioError, match="no scenario 'nothing'"):
        scenario.find("nothing")


def test_names_for_several() -> None:
    everything = scenario.names()
    assert [file.name for file in scenario.find_all("all")] == everything
    seed = [file.name for file in scenario.find_all("seed")]
    assert seed == [name for name in everything if name not in ("pingpong", "faults")]
    assert [file.name for file in scenario.find_all("faults")] == ["faults"]
    with pytest.raises(ScenarioError, match="seed and all for several"):
        scenario.find_all("some")
