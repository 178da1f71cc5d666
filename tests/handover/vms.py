"""The same with real machines: ``sterna run`` with the guest `random`, whose whole RAM follows from its step count."""

import os
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from tests.cli.vms import Vm, wait_for
from tests.handover.case import Call, Case, Run, Second, Verdict
from tests.handover.ends import TIMEOUT, EndedError, State, probe

from sterna.guests.check import check_ram
from sterna.guests.layout import StatusError, read_status_of_ram
from sterna.monitor.client import ConnectionLost
from sterna.monitor.protocol import QmpError

_MEMORY = 16 << 20
_RAM_BASE = 0x40000000
_STEPS = 200
_QUESTIONS = 500
"""Answered with 3 kB each: more than a socket holds."""


class VmEnd:
    """One end, with QMP."""

    def __init__(self, folder: Path, name: str, *arguments: str) -> None:
        self._folder, self._name = folder, name
        self.vm = Vm(folder, name, "--serial", "null", *arguments)
        self.pid = self.vm.process.pid
        self.address = ""

    def connect(self) -> None:
        self.vm.connect()

    def _command(self, name: str, arguments: dict[str, Any] | None = None) -> Any:
        try:
            return self.vm.qmp.execute(name, arguments or {})
        except ConnectionLost as error:
            self.vm.process.wait(TIMEOUT)  # nothing else ends a connection to a monitor here
            raise EndedError from error

    def migrate(self, uri: str, parameters: dict[str, object]) -> None:
        self._command("migrate-set-parameters", dict(parameters))
        self._command("migrate", {"uri": uri})

    def expire(self) -> None:
        raise NotImplementedError("there is no such case with real machines")

    def outcome(self) -> State:
        wait_for(lambda: self._command("query-migrate")["status"] in ("completed", "failed", "cancelled"))
        return self.state()

    def state(self) -> State:
        info = self._command("query-migrate")
        running = bool(self._command("query-status")["running"])
        error = info.get("error-desc", "")
        in_doubt = bool(info.get("x-sterna", {}).get("in-doubt", False))
        return State(running, in_doubt, info.get("status", ""), error, None)

    def settle(self) -> None:
        probe(self.address)
        wait_for(lambda: self._command("query-migrate").get("status") not in ("setup", "active"))

    def resolve(self, uri: str) -> str:
        try:
            return str(self._command("x-sterna-resolve-doubt", {"uri": uri})["found"])
        except QmpError:
            return ""

    def go_on(self) -> None:
        self._command("cont")

    def quit(self) -> None:
        with self._client_that_does_not_read():
            os.kill(self.pid, signal.SIGTERM)
            # This client's connection is ended at once, the other is waited for.
            with suppress(ConnectionLost):
                self.vm.qmp.wait_event(lambda event: False, TIMEOUT)

    @contextmanager
    def _client_that_does_not_read(self) -> Iterator[None]:
        """It has asked for so much that its answers do not fit its socket."""
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(self.vm.address.removeprefix("unix:"))
            client.setblocking(False)
            client.send(b'{"execute": "qmp_capabilities"}\n')
            with suppress(BlockingIOError):
                for _ in range(_QUESTIONS):
                    client.send(b'{"execute": "query-commands"}\n')
            yield

    def _ram(self) -> "np.ndarray[Any, np.dtype[np.uint8]]":
        path = self._folder / f"{self._name}.ram"
        self._command("pmemsave", {"val": _RAM_BASE, "size": _MEMORY, "filename": str(path)})
        return np.fromfile(path, dtype=np.uint8)

    def steps(self) -> int:
        """Steps that the guest has made."""
        try:
            return int(read_status_of_ram(self._ram()).cpu(0)["steps"])
        except (StatusError, IndexError):
            return 0

    def problem(self) -> str:
        before = self.steps()
        wait_for(lambda: self.steps() > before)
        self._command("stop")
        return "; ".join(check_ram(self._ram()))

    def close(self) -> None:
        self.vm.close()


def run_vms(case: Case, second: Second) -> Verdict:
    """Run a case with two ``sterna run``. Its place is a byte."""
    assert not isinstance(case.place, Call)
    with tempfile.TemporaryDirectory(prefix="sterna-soak-") as name, ExitStack() as stack:
        folder = Path(name)
        source = VmEnd(folder, "source", "--kernel", "random", "--append", "7 1000")
        stack.callback(source.close)
        incoming = f"unix:{folder}/incoming" if case.unix else "tcp:127.0.0.1:0"
        destination = VmEnd(folder, "destination", "--incoming", incoming)
        stack.callback(destination.close)
        source.connect()
        destination.connect()
        wait_for(lambda: source.steps() > _STEPS)
        destination.address = incoming if case.unix else destination.vm.incoming_uri()
        return Run(case, folder, source, destination, destination.address, second).verdict()
