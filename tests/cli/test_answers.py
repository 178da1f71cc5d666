"""`sterna migrate` and a server whose answers are no VM's: one line, and whether the migration may have begun."""

import contextlib
import io
import itertools
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.cli.vms import TIMEOUT

from sterna.cli.display import PlainDisplay, outcome_lines, outlook
from sterna.cli.progressestimate import ProgressEstimator
from sterna.cli.result import exit_code, summarise
from sterna.monitor.answers import Migration
from sterna.monitor.client import _MAX_EVENT_BYTES, _MAX_EVENTS, QmpClient

RAM = {
    "transferred": 5,
    "remaining": 1 << 20,
    "total": 1 << 30,
    "duplicate": 7,
    "normal": 300,
    "dirty-pages-rate": 100,
    "mbps": 1000.0,
    "dirty-sync-count": 2,
    "page-size": 4096,
}
OWN = {
    "uri": "tcp:127.0.0.1:1",
    "peer": "sterna",
    "verified": True,
    "ram-digest-source": "0123456789abcdef",
    "ram-digest-destination": "0123456789abcdef",
    "total-ms": 1234.5,
    "downtime-ms": 1.5,
    "least-downtime-ms": 1000.0,
    "predicted-downtime-ms": 2.5,
    "predicted-over-real": 1.2,
    "passes": [{"pages": 7, "dirty_pages_after": 5}],
    "in-doubt": False,
    "saved-pages": 0,
    "policy": "adaptive",
    "verdict": "",
    "clock-note": "clocks disagree",
}
ACTIVE = {
    "status": "active",
    "error-desc": "none",
    "total-time": 1234,
    "setup-time": 1,
    "downtime": 2,
    "expected-downtime": 300,
    "cpu-throttle-percentage": 20,
    "ram": RAM,
    "xbzrle-cache": {"pages": 5, "overflow": 1},
    "x-sterna": OWN,
}
CAPABILITIES = [{"capability": "auto-converge", "state": False}]


class FakeVm:
    """Answers one client as a VM does whose migration completes, but for one answer.

    :param wrong: number of the command that is answered with `answer`
    :ivar commands: those that came
    """

    def __init__(self, path: Path, wrong: int = -1, answer: str = "") -> None:
        self.address = f"unix:{path}"
        self.commands: list[str] = []
        self._wrong, self._answer = wrong, answer
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> "FakeVm":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join(TIMEOUT)
        self._listener.close()

    def _serve(self) -> None:
        connection, _ = self._listener.accept()
        with contextlib.suppress(OSError), connection, connection.makefile("rw") as lines:
            print(json.dumps({"QMP": {}}), file=lines, flush=True)
            for line in lines:
                name = json.loads(line)["execute"]
                good = json.dumps({"return": self._good(name)})
                mine = len(self.commands) == self._wrong
                self.commands.append(name)
                if mine and not self._answer:
                    return
                print(self._answer if mine else good, file=lines, flush=True)

    def _good(self, name: str) -> Any:
        if name == "query-migrate":
            if "migrate" not in self.commands:
                return {}
            continued = "migrate-continue" in self.commands
            return {**ACTIVE, "status": "completed" if continued else "pre-switchover"}
        return {
            "query-status": {"status": "postmigrate" if "migrate" in self.commands else "running"},
            "query-migrate-parameters": {
                "downtime-limit": 300,
                "max-bandwidth": 1 << 27,
                "x-sterna-policy": "adaptive",
            },
            "query-migrate-capabilities": CAPABILITIES,
            "x-sterna-query-asked-capabilities": ["auto-converge"],
        }.get(name, {})


OPTIONS = ("tcp:127.0.0.1:1", "--bandwidth", "1MB", "--auto-converge")


@pytest.fixture
def commands(tmp_path: Path, cli) -> list[str]:
    """What `sterna migrate` asks, in order."""
    with FakeVm(tmp_path / "good") as vm:
        code, _, err = cli("migrate", vm.address, *OPTIONS)
    assert code == 0, err
    assert {"migrate-set-parameters", "migrate-set-capabilities", "migrate-continue"} <= set(vm.commands)
    return vm.commands


HUGE = f'{{"return": {{"status": "active", "downtime-limit": 1{"0" * 4000}}}}}'
NO_ANSWERS = (HUGE, '{"return": null}', '{"return": "text"}', '{"return": 5}', '{"error": {}}')


@pytest.mark.parametrize(
    "answer",
    [
        *NO_ANSWERS,
        '{"return": {}}',
        '{"return": []}',
        '{"return": [{"status": null}]}',
        '{"return": {"status": null, "ram": {"mbps": null}}}',
        '{"return": {"status": "active", "ram": {"mbps": null}, "x-sterna": []}}',
        '{"return": {"downtime-limit": "300"}}',
        HUGE,
        '{"error": {"class": "GenericError", "desc": "no"}}',
        "",
    ],
)
def test_an_answer_that_is_no_vms_is_told_in_one_line(
    tmp_path: Path, cli, commands: list[str], answer: str
) -> None:
    began = commands.index("migrate")
    outcome = began + commands[began:].index("query-status") + 1
    for number, command in enumerate(commands):
        with FakeVm(tmp_path / f"qmp{number}", number, answer) as vm:
            code, _, err = cli("migrate", vm.address, *OPTIONS)
        place = f"{number}: {command}: {err}"
        assert "Traceback" not in err, place
        told = [line for line in err.splitlines() if line.startswith("sterna: error: ")]
        if code:
            refused = number == began and "GenericError" in answer
            assert (code, len(told)) == (1 if number < began or refused else 6, 1), place
            assert err.endswith(told[0] + "\n"), place
        if number < began:
            assert "migrate" not in vm.commands or not code, place
        # No command has such an answer; those after the outcome only set back what was set.
        if command.startswith("query-") and number < outcome and answer in NO_ANSWERS:
            assert code, place
        if command == "query-migrate" and number > began and answer == '{"return": {}}':
            assert code, place
        if command == "migrate" and not answer:
            assert "whether it has begun is not known here" in err


def leaves(value: object, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to all parts of a JSON value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in inner:
        yield from leaves(item, (*path, name))


def replaced(value: Any, path: tuple[Any, ...], new: object) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


NASTY = (None, True, -1, 0, (1 << 64) - 1, -0.5, 1e308, "", "text", [], [None], {}, {"": None})


@pytest.mark.parametrize("status", ["active", "completed", "failed", "device"])
@pytest.mark.parametrize("limit_ms", [0, 300, (1 << 64) - 1])
def test_what_passes_for_an_answer_can_be_shown(status: str, limit_ms: int) -> None:
    shown = 0
    for path, new in itertools.product(list(leaves(ACTIVE))[1:], NASTY):
        info = replaced({**ACTIVE, "status": status}, path, new)
        try:
            msgspec.convert(info, Migration)
        except msgspec.ValidationError:
            continue
        estimator = ProgressEstimator(limit_ms)
        for seen in (ACTIVE, info, info):
            estimate = estimator.update(seen)
            assert outlook(estimate)
            PlainDisplay(io.StringIO()).show(estimate)
        summary = summarise(info)
        assert outcome_lines(summary)
        exit_code(summary, must_verify=True)
        shown += 1
    assert shown > 50


def test_an_address_is_as_long_as_its_user_made_it(
    tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = "exec:cat > /dev/null #" + "x" * 100_000
    monkeypatch.setitem(OWN, "uri", uri)
    with FakeVm(tmp_path / "qmp") as vm:
        code, _, err = cli("migrate", vm.address, uri)
    assert code == 0, err[:1000]


def test_events_are_kept_in_bounds() -> None:
    near, far = socket.socketpair()

    def talk() -> None:
        small = json.dumps({"event": "SMALL"}).encode() + b"\n"
        with contextlib.suppress(OSError):
            far.sendall(b'{"QMP": {}}\n{"return": {}}\n' + small * 2 * _MAX_EVENTS)
            far.sendall(json.dumps({"event": "x" * _MAX_EVENT_BYTES}).encode() + b"\n")
            far.sendall(b'{"return": {}}\n')

    with near, far:
        thread = threading.Thread(target=talk)
        thread.start()
        with QmpClient(near, "it", TIMEOUT) as client:
            client.command("query-status")
            assert {event["event"] for event in client.events} == {"SMALL"}
            assert len(client.events) == _MAX_EVENTS
        thread.join(TIMEOUT)
