"""Machines with their monitors, in this process."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.monitor.qmpserver import ServerThread, serving

from sterna.machine.config import MEBIBYTE, MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.migration.controller import MigrationController
from sterna.monitor.commands import Commands
from sterna.monitor.control import Control


@dataclass
class Monitored:
    """A machine, its migrations, and a QMP server for them.

    :ivar quits: reasons given to `quit`
    """

    machine: Machine
    migration: MigrationController
    control: Control
    server: ServerThread
    quits: list[str]


@contextmanager
def monitored(path: Path, **settings: Any) -> Iterator[Monitored]:
    """A machine with 16 MiB that runs `dirtyram`, or what the settings say; it is not started."""
    if not settings.get("incoming"):
        settings = {"kernel": "dirtyram", "append": "500 10 5", **settings}
    config = MachineConfig(**{"memory_bytes": 16 * MEBIBYTE, "name": "tested", **settings})
    emitters: list[Any] = []

    def emit(name: str, data: dict[str, Any]) -> None:
        for emitter in emitters:
            emitter(name, data)

    quits: list[str] = []
    with Machine(config) as machine, MigrationController(MigratableMachine(machine), emit) as migration:
        control = Control(machine, migration, quits.append)
        with serving(Commands(control).execute, path) as server:
            emitters.append(server.emit)
            unsubscribe = machine.subscribe(server.emit)
            try:
                yield Monitored(machine, migration, control, server, quits)
            finally:
                unsubscribe()
                emitters.clear()
