"""What is added by name: modules of a package, entry points of other distributions, and what a process adds itself."""

import subprocess
import sys
from pathlib import Path

import pytest

from sterna.hypervisor.accelerator import ACCELERATORS
from sterna.hypervisor.architecture import ARCHITECTURES
from sterna.machine.board import BOARDS
from sterna.migration.parameters import POLICIES
from sterna.registry import PluginError, Registry, UnknownName
from sterna.testbed.kind import KindOptions
from sterna.testbed.kinds import VM_KINDS


def install(folder: Path, name: str, entry_points: str) -> None:
    """What pip leaves of a distribution."""
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[things.of.a.test]\n{entry_points}\n")


@pytest.fixture
def things(tmp_path, monkeypatch) -> Registry[str]:
    """Two built-in modules, a folder, two that are none, and another distribution on the path."""
    package = tmp_path / f"things_{tmp_path.name}"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "a_folder").mkdir()
    for name in ("a_folder/__init__", "plain", "two_words", "_shared", "apart"):
        (package / f"{name}.py").write_text(f"THING = {name.partition('/')[0]!r}\n")
    (tmp_path / f"other_{tmp_path.name}.py").write_text("THING = 'other'\nPLAIN = 'not the built-in one'\n")
    other = f"other_{tmp_path.name}"
    install(
        tmp_path,
        "other",
        f"other = {other}:THING\nplain = {other}:PLAIN\nwrong = {other}:NOTHING\nmissing = no_such_module_here",
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return Registry("things.of.a.test", package.name, "THING", left_out=("apart",))


def test_the_names_of_all(things) -> None:
    assert list(things) == ["a_folder", "plain", "two-words", "other", "wrong", "missing"]


@pytest.mark.parametrize(
    ("name", "item"),
    [("a_folder", "a_folder"), ("plain", "plain"), ("two-words", "two_words"), ("other", "other")],
)
def test_each_is_there_by_its_name(things, name, item) -> None:
    assert name in things
    assert things.get(name) == item


@pytest.mark.parametrize(
    "name", ["", "a-folder", "apart", "two_words", "_shared", "-shared", "plain.x", "__init__"]
)
def test_what_nobody_registered_is_not_there(things, name) -> None:
    assert name not in things
    with pytest.raises(UnknownName, match="there are a_folder, plain, two-words, other"):
        things.get(name)


@pytest.mark.parametrize("name", ["wrong", "missing"])
def test_an_entry_point_that_cannot_be_loaded_is_named(things, name) -> None:
    assert name in things
    with pytest.raises(PluginError, match=rf"^things\.of\.a\.test: {name} \(.* cannot be loaded: "):
        things.get(name)


def test_two_distributions_with_the_same_name_are_told_of(things, tmp_path) -> None:
    install(tmp_path, "third", "other = third:THING")
    with pytest.raises(PluginError, match=r"other is other_.*:THING and third:THING"):
        things.get("other")


def test_a_process_adds_and_replaces(things) -> None:
    things.add("own", "mine")
    things.add("plain", "instead")
    assert (things.get("own"), things.get("plain")) == ("mine", "instead")
    assert list(things)[:4] == ["a_folder", "plain", "two-words", "own"]


def test_a_built_in_name_costs_neither_modules_nor_metadata() -> None:
    """The command line asks for names before it does anything."""
    script = (
        "import sys\nfrom sterna.registry import Registry\n"
        "known = Registry('things.of.a.test', 'sterna.host', 'X')\n"
        "assert 'units' in known\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=True
    )
    assert not {"importlib.metadata", "sterna.host.units"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (ACCELERATORS, ["emulated", "kvm"]),
        (ARCHITECTURES, ["arm64", "armv7", "x86_64"]),
        (BOARDS, ["pc-min", "vexpress-a15", "virt", "virt-arm64"]),
        (POLICIES, ["adaptive", "deadline", "fixed"]),
    ],
)
def test_what_ships_has_the_name_of_its_file(registry, names) -> None:
    assert list(registry)[: len(names)] == names
    for name in names:
        assert registry.get(name).name == name


def test_the_kinds_of_vm_have_the_names_of_their_files() -> None:
    assert list(VM_KINDS) == ["emulated", "emulated-vexpress", "kvm", "qemu", "qemu-linux"]
    for name in VM_KINDS:
        kind = VM_KINDS.get(name)(KindOptions())
        assert kind.name == name
        assert not kind.accel or kind.accel in ACCELERATORS
