"""Hypervisors by name: what each says of itself, and what is refused before anything is made."""

import contextlib
import platform

import pytest

from sterna.hypervisor.accelerator import ACCELERATORS, check_arch, open_vm
from sterna.hypervisor.architecture import ARCHITECTURES
from sterna.hypervisor.interface import ArgumentError, DirtyLogMode, Unsupported
from sterna.machine.board import BOARDS
from sterna.registry import UnknownName


@pytest.mark.parametrize("name", ["emulated", "kvm"])
def test_each_that_ships_has_its_board_and_its_logs(name: str) -> None:
    accelerator = ACCELERATORS.get(name)
    assert accelerator.name == name
    assert accelerator.board in BOARDS
    assert DirtyLogMode.BITMAP in accelerator.dirty_logs
    assert accelerator.kernels


def test_they_are_all_that_ship() -> None:
    assert [name for name in ACCELERATORS if ":" not in name] == ["emulated", "kvm"]


def test_an_emulated_vm_is_opened_without_a_board() -> None:
    with contextlib.closing(open_vm(vcpus=2)) as vm:
        assert [vm.create_vcpu(index) for index in range(2)]


@pytest.mark.parametrize(
    ("accel", "arch", "kind", "message"),
    [
        ("tcg", "armv7", UnknownName, "sterna.accelerators: there is no 'tcg'; there are emulated, kvm"),
        ("emulated", "mips", ArgumentError, "no architecture 'mips'; there are armv7, arm64, x86_64"),
        (
            "emulated",
            "x86_64",
            Unsupported,
            "accel emulated: there is no x86_64 CPU; use accel kvm, or an ARMv7 board",
        ),
        (
            "kvm",
            "arm64" if platform.machine() == "x86_64" else "x86_64",
            Unsupported,
            "accel kvm: .* guests need a host that is .*, this one is .*; use accel emulated, or another board",
        ),
    ],
)
def test_what_cannot_be_opened_is_named(accel: str, arch: str, kind: type[Exception], message: str) -> None:
    for refuse in (check_arch, open_vm):
        with pytest.raises(kind, match=f"^{message}"):
            refuse(accel, arch)


def test_architectures_are_what_boards_have() -> None:
    assert {BOARDS.get(name).arch for name in BOARDS} == set(ARCHITECTURES)
