"""What other programs use: the names of `sterna` itself."""

import ast
import contextlib
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import sterna
from sterna.registry import Registry


def run(script: str) -> str:
    """What a program prints that begins with nothing imported."""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=300, check=True
    )
    return done.stdout


def declared() -> dict[str, str]:
    """Where the names come from, as type checkers are told."""
    assert sterna.__file__ is not None
    [block] = [one for one in ast.parse(Path(sterna.__file__).read_text()).body if isinstance(one, ast.If)]
    return {
        alias.asname or alias.name: f"{one.module}:{alias.name}"
        for one in block.body
        if isinstance(one, ast.ImportFrom)
        for alias in one.names
    }


def test_importing_it_imports_nothing() -> None:
    before, after = (
        set(run(f"import sys{what}; print(*sys.modules)").split())
        for what in ("", ", importlib, typing, sterna")
    )
    extra = run("import sys, importlib, typing; print(*sys.modules)").split()
    assert after - before - set(extra) == {"sterna", "sterna.version"}


def test_there_are_as_many_as_one_can_learn() -> None:
    assert 20 <= len(sterna.__all__) <= 40
    assert sterna.__all__ == sorted(set(sterna.__all__), key=lambda name: (not name.isupper(), name))
    assert set(sterna.__all__) <= set(dir(sterna))


def test_names_are_fetched_from_where_type_checkers_look() -> None:
    places = declared()
    assert {"__version__", *places} == set(sterna.__all__)
    for name, place in places.items():
        module, _, there = place.partition(":")
        assert getattr(sterna, name) is getattr(importlib.import_module(module), there)


@pytest.mark.parametrize("name", ["Vms", "machines", "_homes", "numpy", "MigrationController"])
def test_there_is_nothing_else(name: str) -> None:
    with pytest.raises(AttributeError, match=f"module 'sterna' has no attribute '{name}'"):
        getattr(sterna, name)


def test_each_says_what_it_is() -> None:
    for name in sterna.__all__:
        item = getattr(sterna, name)
        assert isinstance(item, str | Registry) or item.__doc__, name
        assert not isinstance(item, type) or not issubclass(item, Exception) or issubclass(item, sterna.Error)


def test_a_hypervisor_is_used_without_a_board() -> None:
    size = 1 << 20
    with contextlib.closing(sterna.open_vm()) as vm, sterna.RamBlock("ram", size) as block:
        vm.set_memory_slot(
            sterna.MemorySlot(0, 0x4000_0000, size, block, flags=sterna.SlotFlags.LOG_DIRTY_PAGES)
        )
        vm.mark_dirty(0, 5, 1)
        assert list(sterna.page_numbers(vm.harvest_dirty_log(0))) == [5]


def test_a_stream_is_read_and_compared(tmp_path) -> None:
    (tmp_path / "nothing").write_bytes(b"")
    survey = sterna.read_stream(str(tmp_path / "nothing"), digests=True)
    assert isinstance(survey, sterna.StreamSurvey)
    assert survey.flaw
    with pytest.raises(sterna.Error, match="unix:/nowhere"):
        sterna.QmpClient.connect("unix:/nowhere/socket")


def test_a_machine_migrates() -> None:
    size = 16 << 20
    with (
        sterna.Machine(sterna.MachineConfig(memory_bytes=size, kernel="clock", append="10")) as here,
        sterna.Machine(sterna.MachineConfig(memory_bytes=size, incoming=True)) as there,
        sterna.Migrations(sterna.MigratableMachine(here)) as source,
        sterna.Migrations(sterna.MigratableMachine(there)) as destination,
    ):
        here.cont()
        source.migrate(destination.incoming("tcp:127.0.0.1:0"))
        assert source.wait(300).status.value == "completed"
        assert destination.wait(300).status.value == "completed"
        assert (here.run_state, there.run_state) == (sterna.RunState.POSTMIGRATE, sterna.RunState.RUNNING)
