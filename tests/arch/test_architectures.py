"""What each architecture says of itself, and that it costs nothing to ask."""

import subprocess
import sys

import pytest

from sterna.hypervisor.accelerator import ACCELERATORS
from sterna.hypervisor.architecture import ARCHITECTURES
from sterna.hypervisor.kvm.vm import KvmVm
from sterna.machine.board import BOARDS
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.platform import Platform, platform_of

ASKED = """
import sys
from sterna.hypervisor.architecture import ARCHITECTURES
print(*(ARCHITECTURES.get(name).name for name in ARCHITECTURES))
print(*sys.modules)
"""
LIGHT = {"sterna.hypervisor", "sterna.hypervisor.architecture"}
"""All of the package that it takes, but for the architectures' own."""


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_each_names_what_it_has(name: str) -> None:
    architecture = ARCHITECTURES.get(name)
    assert architecture.name == name
    assert architecture.kvm.models
    assert issubclass(architecture.kvm.load(), KvmVm)
    boards = [board for board in map(BOARDS.get, BOARDS) if board.arch == name]
    assert boards
    for board in boards:
        assert board.architecture is architecture
        assert issubclass(platform_of(board), Platform)


def test_to_ask_for_one_loads_no_code_of_it() -> None:
    """Hosts without an emulator ask, and so does each command that has a board."""
    done = subprocess.run(
        [sys.executable, "-c", ASKED], capture_output=True, text=True, timeout=60, check=True
    )
    names, modules = (line.split() for line in done.stdout.splitlines())
    assert names == list(ARCHITECTURES)
    ours = {one for one in modules if one.startswith(("sterna.hypervisor", "sterna.arch", "sterna.machine"))}
    own = {one for one in ours if one.rpartition(".")[0] == "sterna.arch" or one.endswith(".stage2")}
    assert ours - own - {"sterna.arch"} == LIGHT
    assert not {"numpy", "numba", "unicorn"} & set(modules)


def test_each_hypervisor_has_cpus_of_its_own() -> None:
    for accel in ("emulated", "kvm"):
        for name in ARCHITECTURES:
            assert ACCELERATORS.get(accel).cpus(ARCHITECTURES.get(name))
    assert MachineConfig(machine="virt").cpu == "cortex-a15"
    assert MachineConfig(machine="virt-arm64", accel="kvm").cpu == "host"
    with pytest.raises(ConfigError, match=r"^cpu: 'host' is not known; choose cortex-a15$"):
        MachineConfig(machine="virt", cpu="host")
