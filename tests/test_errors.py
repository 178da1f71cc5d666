"""The exceptions of all modules make one tree, and the tree is the one that is written down."""

import json
import re
import subprocess
import sys

import pytest

import sterna.errors
from sterna.errors import Error, InternalError
from sterna.host.printable import describe

pytestmark = pytest.mark.slow

WALK = """
import importlib, inspect, json, pkgutil, sterna

found = {}
for module in pkgutil.walk_packages(sterna.__path__, "sterna."):
    if module.name.endswith("__main__"):
        continue
    for item in vars(importlib.import_module(module.name)).values():
        if inspect.isclass(item) and issubclass(item, BaseException) and item.__module__ == module.name:
            found[f"{module.name}.{item.__qualname__}"] = [base.__name__ for base in item.__mro__[1:]]
print(json.dumps(found))
"""
"""In a process of its own: what is imported there stays in nobody's way."""


@pytest.fixture(scope="module")
def classes() -> dict[str, list[str]]:
    """All exceptions of the program, each with the names of its ancestors, the nearest first."""
    done = subprocess.run(
        [sys.executable, "-c", WALK], capture_output=True, text=True, timeout=300, check=True
    )
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


def test_all_have_one_root(classes) -> None:
    assert len(classes) > 50
    beside = [
        name for name, above in classes.items() if "Error" not in above and name != "sterna.errors.Error"
    ]
    assert beside == []


def test_the_branches_are_those_that_are_written_down(classes) -> None:
    assert sterna.errors.__doc__ is not None
    written = re.findall(r"^    [├└]── (\w+)  ", sterna.errors.__doc__, re.MULTILINE)
    branches = {name.rpartition(".")[2] for name, above in classes.items() if above[0] == "Error"}
    assert set(written) == branches


@pytest.mark.parametrize(
    ("name", "above"),
    [
        # Told apart by who drives a VM: a command that it refuses, and a VM that is gone.
        ("sterna.monitor.client.ConnectionLost", ["MonitorError", "Error"]),
        ("sterna.monitor.addresses.AddressError", ["QmpError", "MonitorError", "Error"]),
        # The VMs of a test bed, and of the demo, fail in the same ways.
        ("sterna.testbed.errors.ScenarioError", ["BedError", "LaunchError", "Error"]),
        # These are built-in errors besides.
        ("sterna.host.newfile.NotAFileError", ["HostError", "Error", "OSError"]),
        ("sterna.host.newfile.UnsyncedError", ["HostError", "Error", "OSError"]),
        ("sterna.host.address.AddressError", ["HostError", "Error", "ValueError"]),
        ("sterna.machine.guestram.AddressError", ["MachineError", "Error", "ValueError"]),
        ("sterna.analysis.proxy.tee.LeftBehind", ["MigrationError", "Error", "OSError"]),
        # Faults of this program, which no command takes for its user's.
        ("sterna.ownership.IllegalEvent", ["InternalError", "Error"]),
        ("sterna.migration.progress.IllegalTransition", ["InternalError", "Error"]),
    ],
)
def test_where_in_the_tree_some_are(classes, name: str, above: list[str]) -> None:
    assert classes[name][: len(above)] == above


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (Error("the text"), "the text"),
        (InternalError("two\nlines"), "two lines"),
        (Error(), "internal error: Error:"),
        (ValueError("the text"), "internal error: ValueError: the text"),
        (OSError(2, "not there", "file"), "file: not there"),
        (MemoryError(), "this host has no memory left"),
    ],
)
def test_an_error_for_people(error: BaseException, text: str) -> None:
    assert describe(error) == text
