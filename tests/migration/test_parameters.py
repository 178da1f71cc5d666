"""Parameters and capabilities, compared with QEMU's own answers where it is installed."""

import json
import subprocess
from collections.abc import Mapping
from typing import Any

import pytest

from sterna.host.printable import describe
from sterna.hypervisor.interface import HypervisorError
from sterna.machine.runstate import RunState, RunStateError
from sterna.migration.errors import ParameterError
from sterna.migration.parameters import CAPABILITIES, PARAMETERS, Parameters
from sterna.ownership import NotTheOwner
from sterna.stream.wire import StreamError


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"max-bandwith": 1}, "unknown migration parameter 'max-bandwith'"),
        ({"max-bandwidth": -1}, "outside"),
        ({"max-bandwidth": 1 << 64}, "outside"),
        ({"max-bandwidth": "1G"}, "takes an integer"),
        ({"max-bandwidth": True}, "takes an integer"),
        ({"downtime-limit": 2_000_001}, "takes 0 to 2000000"),
        ({"xbzrle-cache-size": 5000}, "power of two"),
        ({"cpu-throttle-tailslow": 1}, "takes a boolean"),
        ({"tls-creds": 1}, "takes a string"),
        ({"x-sterna-verify": "maybe"}, "takes auto, off, on"),
        ({"cpu-throttle-initial": 50, "max-cpu-throttle": 40}, "must not be below"),
    ],
)
def test_wrong_values_change_nothing(changes: Mapping[str, object], text: str) -> None:
    parameters = Parameters()
    before = parameters.values()
    with pytest.raises(ParameterError, match=text):
        parameters.set({"downtime-limit": 7, **changes})
    assert parameters.values() == before


def test_values_are_kept_and_announced() -> None:
    calls: list[int] = []
    parameters = Parameters(lambda: calls.append(parameters.number("max-bandwidth")))
    parameters.set({"max-bandwidth": 0, "downtime-limit": 50, "multifd-channels": 4})
    assert calls == [0]
    assert parameters.seconds("downtime-limit") == 0.05
    assert parameters.values()["multifd-channels"] == 4


def test_only_capabilities_that_exist_can_be_enabled() -> None:
    parameters = Parameters()
    parameters.set_capabilities({"events": True, "xbzrle": False})
    assert parameters.has("events")
    with pytest.raises(ParameterError, match="'postcopy-ram' is not implemented"):
        parameters.set_capabilities({"events": False, "postcopy-ram": True})
    with pytest.raises(ParameterError, match="unknown migration capability 'x'"):
        parameters.set_capabilities({"x": False})
    assert parameters.has("events")


def qemu_answers(qemu: str, *commands: str) -> list[Any]:
    """Ask a QEMU over QMP on its standard input and output."""
    lines = [json.dumps({"execute": name}) for name in ("qmp_capabilities", *commands, "quit")]
    done = subprocess.run(
        [qemu, "-M", "none", "-nodefaults", "-nographic", "-qmp", "stdio"],
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=600,
    )
    replies = [json.loads(line) for line in done.stdout.splitlines()]
    return [reply["return"] for reply in replies if "return" in reply][1 : 1 + len(commands)]


def test_names_types_and_defaults_are_qemus(qemu: str) -> None:
    theirs, capabilities = qemu_answers(qemu, "query-migrate-parameters", "query-migrate-capabilities")
    ours = Parameters().values()
    assert {name: ours.get(name) for name in theirs} == theirs
    assert {entry["capability"] for entry in capabilities} == set(CAPABILITIES)
    unknown = (
        set(ours) - set(theirs) - {"announce-initial", "announce-max", "announce-rounds", "announce-step"}
    )
    assert {name for name in unknown if not name.startswith("x-sterna-")} <= {
        "tls-authz",
        "block-bitmap-mapping",
    }
    assert all(spec.low <= spec.high for spec in PARAMETERS.values())


@pytest.mark.parametrize(
    ("changes", "delays"),
    [
        ({}, [0.0, 0.05, 0.15, 0.25, 0.35]),
        ({"announce-max": 200, "announce-rounds": 6}, [0.0, 0.05, 0.15, 0.2, 0.2, 0.2]),
        ({"announce-initial": 10, "announce-step": 1, "announce-rounds": 3}, [0.0, 0.01, 0.011]),
        ({"announce-rounds": 1}, [0.0]),
        ({"announce-rounds": 0}, []),
    ],
)
def test_when_an_arrived_guest_is_announced(changes: dict[str, int], delays: list[float]) -> None:
    parameters = Parameters()
    parameters.set(changes)
    assert parameters.announce_delays == delays


def test_what_was_said_of_a_capability_can_be_taken_back() -> None:
    """Off because nobody spoke, and off because the user said so, differ: what is not said, the policy chooses."""
    parameters = Parameters()
    choices = (parameters.most_throttle, parameters.may_choose_xbzrle)
    assert choices == (99, True)
    for said in (True, False):
        parameters.set_capabilities({"auto-converge": said, "xbzrle": said})
        assert (parameters.has("auto-converge"), parameters.has("xbzrle")) == (said, said)
        assert parameters.asked_capabilities == {"auto-converge", "xbzrle"}
        assert (parameters.most_throttle, parameters.may_choose_xbzrle) != choices
        parameters.set_capabilities({"auto-converge": None, "xbzrle": None})
        assert (parameters.has("auto-converge"), parameters.has("xbzrle")) == (False, False)
        assert parameters.asked_capabilities == frozenset()
        assert (parameters.most_throttle, parameters.may_choose_xbzrle) == choices


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            RunStateError("migrate", RunState.SHUTDOWN, frozenset({RunState.RUNNING})),
            "cannot migrate: the machine",
        ),
        (HypervisorError("accel kvm: no"), "accel kvm: no"),
        (NotTheOwner("it is elsewhere"), "it is elsewhere"),
        (StreamError("bad", "cpu", 3), "section 'cpu', offset 0x3: bad"),
        (OSError(28, "No space left on device", "/f"), "/f: No space left on device"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (MemoryError(), "this host has no memory left"),
        (KeyError("x"), "internal error: KeyError: 'x'"),
    ],
)
def test_only_a_fault_of_this_program_has_a_class_name(error: Exception, text: str) -> None:
    assert describe(error).startswith(text)
