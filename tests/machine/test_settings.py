"""Machine settings: sizes, limits, and what the errors say."""

import pytest
from tests.hosttree import HostTree

from sterna.boards.vexpress_a15 import BOARD as VEXPRESS_A15
from sterna.boards.virt import BOARD as VIRT
from sterna.host import limits
from sterna.machine.config import ConfigError, MachineConfig, parse_memory


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("128", 128 << 20),
        ("1792M", 1792 << 20),
        ("2G", 2 << 30),
        ("2g", 2 << 30),
        ("1.5G", 3 << 29),
        ("4096K", 4 << 20),
        ("4194304B", 4 << 20),
        (" 64M ", 64 << 20),
    ],
)
def test_memory_sizes(text, size):
    assert parse_memory(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1M", "1X", "0x10", "1 M", "1e3", "nan", "1..5G", "²M", "9" * 400 + "G"]
)
def test_texts_that_are_no_size(text):
    with pytest.raises(
        ConfigError, match=r"memory: .* is not a size; write a number and B, K, M, G or T"
    ) as caught:
        parse_memory(text)
    assert len(str(caught.value)) < 120


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_bytes": 0}, "memory: 0 bytes"),
        ({"memory_bytes": -4096}, "memory: -4096 bytes"),
        ({"memory_bytes": (64 << 20) + 1}, "memory: 67108865 bytes is not a multiple of 4096"),
        ({"memory_bytes": 4096}, "less than the 2 MiB"),
        ({"memory_bytes": 3073 << 20}, "at most 3072 MiB"),
        ({"machine": "vexpress-a15", "memory_bytes": 2049 << 20}, "at most 2048 MiB"),
        ({"smp": 0}, "smp: 0 CPUs"),
        ({"smp": 5}, "smp: 5 CPUs"),
        ({"machine": "pc"}, "machine: 'pc'"),
        ({"cpu": "max"}, "cpu: 'max'"),
        ({"accel": "tcg"}, "accel: 'tcg'"),
        ({"devices": ("virtio-oven",)}, "device: 'virtio-oven' is not known"),
        ({"kernel": ""}, "kernel: "),
        ({"append": "a\nb"}, r"append: character 2 is '\\n'"),
        ({"append": "a\0"}, "append: character 2"),
        ({"append": "\udcff"}, "append: character 1"),
        ({"append": "x" * 5000}, "append: 5000 characters"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ConfigError, match=message) as caught:
        MachineConfig(**settings)
    assert "\n" not in str(caught.value)


def test_memory_that_cannot_be_had_is_refused(tmp_path, monkeypatch):
    host = HostTree(tmp_path, total=64 << 20)
    monkeypatch.setattr(limits, "ROOT", host.root)
    MachineConfig(memory_bytes=64 << 20)
    with pytest.raises(ConfigError, match="65 MiB is more than the 64 MiB of this host"):
        MachineConfig(memory_bytes=65 << 20)
    host.unified("/vm")
    host.group("vm", memory__max=48 << 20, memory__current=1)
    MachineConfig(memory_bytes=48 << 20)
    with pytest.raises(ConfigError, match=r"49 MiB is more than the 48 MiB of the control group .*/vm"):
        MachineConfig(memory_bytes=49 << 20)


def test_ram_ends_below_4_gib():
    for board in (VIRT, VEXPRESS_A15):
        assert board.ram_base + board.ram_limit == 1 << 32
