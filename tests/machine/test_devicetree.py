"""The device tree, read back."""

import fdt
import pytest

from sterna.machine import devicetree
from sterna.machine.board import DEVICE_TREE_ROOM
from sterna.machine.config import MAX_APPEND_BYTES, MachineConfig


def parse(**settings):
    blob = devicetree.build(MachineConfig(**settings))
    assert len(blob) <= DEVICE_TREE_ROOM
    return fdt.parse_dtb(blob)


def words(tree, path, name):
    return tree.get_property(name, path).data


def test_bootargs_and_memory():
    tree = parse(append="102580 812 30", memory_bytes=1792 << 20)
    assert tree.get_property("bootargs", "/chosen").value == "102580 812 30"
    assert words(tree, "/memory@40000000", "reg") == [0, 0x4000_0000, 0, 1792 << 20]


def test_empty_bootargs_are_an_empty_string():
    assert bytes(parse().get_property("bootargs", "/chosen").data) == b"\0"


def test_longest_bootargs_fit():
    text = "x" * MAX_APPEND_BYTES
    assert parse(append=text).get_property("bootargs", "/chosen").value == text


@pytest.mark.parametrize("smp", [1, 4])
def test_cpus(smp):
    tree = parse(smp=smp)
    cpus = tree.get_node("/cpus")
    assert [node.name for node in cpus.nodes] == [f"cpu@{i}" for i in range(smp)]
    for i in range(smp):
        assert words(tree, f"/cpus/cpu@{i}", "reg") == [i]
        assert tree.get_property("enable-method", f"/cpus/cpu@{i}").value == "psci"
    assert tree.get_property("method", "/psci").value == "hvc"
    assert words(tree, "/psci", "cpu_on") == [0x8400_0003]


def test_virt_devices():
    tree = parse()
    assert words(tree, "/pl011@9000000", "reg") == [0, 0x0900_0000, 0, 0x1000]
    assert words(tree, "/pl011@9000000", "interrupts") == [0, 1, 4]
    assert words(tree, "/intc@8000000", "reg") == [0, 0x0800_0000, 0, 0x1_0000, 0, 0x0801_0000, 0, 0x1_0000]
    assert words(tree, "/", "interrupt-parent") == words(tree, "/intc@8000000", "phandle")
    timer = words(tree, "/timer", "interrupts")
    assert timer[6:9] == [1, 11, 0x104], "the virtual timer is third: PPI 11, which is interrupt 27"


def test_vexpress_has_no_psci():
    tree = parse(machine="vexpress-a15", smp=2)
    assert not tree.exist_node("/psci")
    assert not tree.exist_property("enable-method", "/cpus/cpu@1")
    assert words(tree, "/memory@80000000", "reg")[1] == 0x8000_0000
    assert tree.exist_node("/pl011@1c090000")
