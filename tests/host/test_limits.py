"""How much of the host this process may take: made-up hosts, and a real control group."""

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.hosttree import MIB, UNLIMITED, HostTree, host

from sterna.host import limits
from sterna.host.limits import Bound, available_bytes, most_bytes, usable_cpus

__all__ = ["host"]


def test_without_groups_it_is_the_hosts_own(host: HostTree) -> None:
    assert available_bytes() == 1024 * MIB
    assert most_bytes() == Bound(4096 * MIB, "this host")
    assert usable_cpus() == len(os.sched_getaffinity(0))


def test_a_host_that_does_not_tell(host: HostTree) -> None:
    for name in ("meminfo", "self/cgroup", "self/mountinfo"):
        (host.root / "proc" / name).unlink()
    assert available_bytes() is None
    assert most_bytes() is None
    assert usable_cpus() >= 1


def test_a_group_of_version_2(host: HostTree) -> None:
    host.unified("/vm")
    host.group("vm", memory__max=300 * MIB, memory__current=100 * MIB)
    assert available_bytes() == 200 * MIB
    assert most_bytes() == Bound(300 * MIB, f"the control group {host.root}/sys/fs/cgroup/vm")
    host.group("vm", memory__max="max\n", memory__high=150 * MIB)
    assert available_bytes() == 50 * MIB, "beyond memory.high it is slowed down"
    assert most_bytes() == Bound(4096 * MIB, "this host")
    host.group("vm", memory__high="max\n")
    assert available_bytes() == 1024 * MIB, "and without a bound the host's counts"


def test_a_group_of_version_1(host: HostTree) -> None:
    host.legacy("/vm")
    host.group("memory/vm", memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=100 * MIB)
    host.group("memory", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=2048 * MIB)
    assert available_bytes() == 200 * MIB
    assert most_bytes() == Bound(300 * MIB, f"the control group {host.root}/sys/fs/cgroup/memory/vm")


def test_swap_that_a_group_of_version_1_has_used_counts(host: HostTree) -> None:
    host.legacy("/vm")
    host.group("memory/vm", memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=100 * MIB)
    host.group("memory/vm", memory__memsw__limit_in_bytes=400 * MIB, memory__memsw__usage_in_bytes=350 * MIB)
    assert available_bytes() == 50 * MIB


@pytest.mark.parametrize(
    ("swap", "allowed", "most"), [(0, "max\n", 300), (500, "max\n", 800), (500, 200 * MIB, 500)]
)
def test_with_swap_more_can_be_had_than_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, swap: int, allowed: str | int, most: int
) -> None:
    host = HostTree(tmp_path / "host", swap=swap * MIB)
    monkeypatch.setattr(limits, "ROOT", host.root)
    host.unified("/vm")
    host.group("vm", memory__max=300 * MIB, memory__current=100 * MIB, memory__swap__max=allowed)
    bound = most_bytes()
    assert bound is not None
    assert bound.size == most * MIB
    assert available_bytes() == 200 * MIB, "but swap is slow, and does not count as memory"


def test_the_least_of_all_groups_on_the_way_up(host: HostTree) -> None:
    host.unified("/a/b/c")
    host.group("a/b/c", memory__max=900 * MIB, memory__current=100 * MIB)
    host.group("a/b", memory__max="max\n", memory__current=100 * MIB)
    host.group("a", memory__max=500 * MIB, memory__current=450 * MIB)
    assert available_bytes() == 50 * MIB
    assert most_bytes() == Bound(500 * MIB, f"the control group {host.root}/sys/fs/cgroup/a")
    host.legacy("/a/b")
    host.group("memory/a/b", memory__limit_in_bytes=900 * MIB, memory__usage_in_bytes=100 * MIB)
    host.group("memory/a", memory__limit_in_bytes=200 * MIB, memory__usage_in_bytes=130 * MIB)
    assert available_bytes() == 70 * MIB


def test_a_limit_above_what_can_be_seen(host: HostTree) -> None:
    host.legacy("/docker/7", top="/docker/7")
    host.group("memory", memory__limit_in_bytes=UNLIMITED, memory__usage_in_bytes=100 * MIB)
    host.group(
        "memory",
        memory__stat=f"cache 0\nhierarchical_memory_limit {250 * MIB}\nhierarchical_memsw_limit {UNLIMITED}\n",
    )
    assert available_bytes() == 150 * MIB


def test_idle_pages_of_files_are_given_back(host: HostTree) -> None:
    host.unified("/vm")
    host.group("vm", memory__max=300 * MIB, memory__current=290 * MIB)
    host.group("vm", memory__stat=f"anon 1\nactive_file {9 * MIB}\ninactive_file {80 * MIB}\n")
    assert available_bytes() == 90 * MIB
    host.legacy("/vm")
    host.group("memory/vm", memory__limit_in_bytes=300 * MIB, memory__usage_in_bytes=290 * MIB)
    host.group("memory/vm", memory__stat=f"inactive_file 1\ntotal_inactive_file {30 * MIB}\n")
    assert available_bytes() == 40 * MIB


def test_a_group_that_has_more_than_its_limit_has_nothing_left(host: HostTree) -> None:
    host.unified("/vm")
    host.group("vm", memory__max=300 * MIB, memory__current=310 * MIB)
    assert available_bytes() == 0


@pytest.mark.parametrize(
    ("top", "group", "below"),
    [
        ("/", "/x/vm", "x/vm"),
        ("/x", "/x/vm", "vm"),
        ("/docker/7", "/docker/7", ""),
        ("/docker/7", "/", ""),  # the host's names are seen from inside
        ("/", "/../vm", ""),  # moved out of its cgroup namespace
    ],
)
def test_where_the_group_is_mounted(host: HostTree, top: str, group: str, below: str) -> None:
    host.unified(group, top=top)
    host.group(below, memory__max=300 * MIB, memory__current=100 * MIB)
    host.write("sys/fs/vm/memory.max", 1)
    assert available_bytes() == 200 * MIB


def test_a_mount_with_a_blank_in_its_name(host: HostTree) -> None:
    host.unified("/vm", place="/sys/fs/c\\040g")
    host.write("sys/fs/c g/vm/memory.max", 300 * MIB)
    host.write("sys/fs/c g/vm/memory.current", 100 * MIB)
    assert available_bytes() == 200 * MIB


@pytest.mark.parametrize("nonsense", ["", "\n", "many\n", "-1\n", "\N{SUPERSCRIPT TWO}\n"])
def test_files_that_cannot_be_understood_bind_nobody(host: HostTree, nonsense: str) -> None:
    host.unified("/vm")
    for name in ("memory.max", "memory.high", "memory.current", "memory.stat", "cpu.max"):
        host.write(f"sys/fs/cgroup/vm/{name}", nonsense)
    host.write("proc/self/mountinfo", (host.root / "proc/self/mountinfo").read_text() + "nonsense\n - \n")
    with (host.root / "proc/self/mountinfo").open("ab") as file:
        file.write(b"1 1 0:1 / /mnt/\xff\x0bname rw - ext4 /dev/x rw\n")
    assert available_bytes() == 1024 * MIB
    assert usable_cpus() == len(os.sched_getaffinity(0))


def test_processors_are_those_that_may_be_used(host: HostTree) -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, allowed)


@pytest.mark.parametrize(("quota", "cpus"), [("max 100000", None), ("50000 100000", 1), ("100001 100000", 2)])
def test_a_quota_of_time(
    host: HostTree, quota: str, cpus: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    host.unified("/a/vm")
    host.group("a", cpu__max=quota + "\n")
    assert usable_cpus() == (cpus or 8)
    host.legacy("/a/vm")
    for name, value in zip(("quota", "period"), quota.replace("max", "-1").split(), strict=True):
        host.write(f"sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_{name}_us", value + "\n")
    assert usable_cpus() == (cpus or 8)


@pytest.fixture
def real_group(root: None) -> Iterator[Path]:
    """A memory group of this machine's, below that of the tests (version 1) or at the top (version 2)."""
    groups = [group for group in limits._groups("memory") if group.read("memory.stat")]
    if not groups:
        pytest.skip("this machine has no memory controller")
    path = (groups[-1] if groups[0].unified else groups[0]).path / f"sterna-limits-{uuid.uuid4().hex[:12]}"
    path.mkdir()
    try:
        yield path
    finally:
        path.rmdir()


def test_a_real_group(real_group: Path) -> None:
    inner = real_group / "inner"
    unified = (real_group / "cgroup.controllers").exists()
    (real_group / ("memory.max" if unified else "memory.limit_in_bytes")).write_text(str(256 * MIB))
    inner.mkdir()
    try:
        program = (
            "from sterna.host.limits import available_bytes as left, most_bytes; before = left(); "
            "taken = bytearray(b'x') * (64 << 20); print(before, left(), most_bytes().size)"
        )
        into = [
            "sh",
            "-c",
            'echo $$ > "$0/cgroup.procs"; exec "$@"',
            str(inner),
            sys.executable,
            "-c",
            program,
        ]
        run = subprocess.run(into, check=True, capture_output=True, text=True)
    finally:
        inner.rmdir()
    before, after, most = map(int, run.stdout.split())
    assert 128 * MIB < before < 256 * MIB
    assert 48 * MIB < before - after < 80 * MIB
    assert most >= 256 * MIB
