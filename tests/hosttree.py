"""Made-up hosts: the files of /proc and of control groups that `sterna.host.limits` reads, below a directory."""

from pathlib import Path

import pytest

from sterna.host import limits

MIB = 1 << 20
UNLIMITED = 0x7FFF_FFFF_FFFF_F000
"""What version 1 shows for a group without a limit."""


class HostTree:
    """A host with no memory controller at first.

    :param root: an empty directory
    """

    def __init__(
        self, root: Path, *, total: int = 4096 * MIB, available: int = 1024 * MIB, swap: int = 0
    ) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        self.write(
            "proc/meminfo",
            f"MemTotal:       {total >> 10} kB\nMemFree:        1 kB\nMemAvailable:   {available >> 10} kB\n"
            f"SwapTotal:      {swap >> 10} kB\nHugePages_Total:       0\n",
        )
        self.belong("")
        self.mount("")

    def write(self, path: str, text: str | int) -> None:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n" if isinstance(text, int) else text)

    def belong(self, lines: str) -> None:
        """What /proc/self/cgroup says."""
        self.write("proc/self/cgroup", lines)

    def mount(self, lines: str) -> None:
        """What /proc/self/mountinfo says, beside an ordinary mount."""
        self.write("proc/self/mountinfo", "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n" + lines)

    def unified(self, group: str, *, top: str = "/", place: str = "/sys/fs/cgroup") -> None:
        """Version 2, this process in `group`."""
        self.belong(f"0::{group}\n")
        self.mount(f"31 21 0:27 {top} {place} rw,nosuid shared:9 - cgroup2 cgroup2 rw\n")

    def legacy(self, group: str, *, top: str = "/") -> None:
        """Version 1, this process in `group`; version 2 is there too, without controllers."""
        self.belong(f"5:cpu,cpuacct:{group}\n4:memory:{group}\n1:name=systemd:/x\n0::/\n")
        self.mount(
            f"33 21 0:29 {top} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
            f"34 21 0:30 {top} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
            "35 21 0:31 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n"
            "36 21 0:32 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
        )
        self.write("sys/fs/cgroup/unified/cgroup.controllers", "")

    def group(self, path: str, **files: str | int) -> None:
        """A group's files; `__` in a name stands for a dot."""
        for name, text in files.items():
            self.write(f"sys/fs/cgroup/{path}/{name.replace('__', '.')}", text)


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HostTree:
    """A made-up host that this process is taken to be on."""
    tree = HostTree(tmp_path / "host")
    monkeypatch.setattr(limits, "ROOT", tree.root)
    return tree
