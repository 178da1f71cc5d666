from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.machine.images import program

from sterna.machine.config import MachineConfig
from sterna.machine.machine import Machine

CODE = 0x4020_0000
MEMORY = 32 << 20


@pytest.fixture
def make_machine() -> Iterator[Callable[..., Machine]]:
    """Makes machines with their serial line in memory, and closes them."""
    machines: list[Machine] = []

    def make(**settings: object) -> Machine:
        defaults: dict[str, object] = {"memory_bytes": MEMORY, "serial": "memory"}
        machine = Machine(MachineConfig(**(defaults | settings)))  # type: ignore[arg-type]
        machines.append(machine)
        return machine

    yield make
    for machine in machines:
        machine.close()


@pytest.fixture
def make_kernel(tmp_path: Path) -> Callable[..., str]:
    """Makes kernel files of a few instructions, loaded at `CODE`."""

    def make(words: list[int], at: int = CODE) -> str:
        path = tmp_path / f"kernel{len(list(tmp_path.iterdir()))}.elf"
        path.write_bytes(program(words, at))
        return str(path)

    return make
