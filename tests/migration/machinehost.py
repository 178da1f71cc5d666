"""A host, for tests with a real machine in place of a double."""

from tests.migration.pairs import Host

from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine


class MachineHost(Host):
    """A machine and its guest's migrations.

    :param kind: what the migrations see of the machine
    """

    def __init__(self, machine: Machine, kind: type[MigratableMachine] = MigratableMachine) -> None:
        self.machine = machine
        super().__init__(kind(machine))  # type: ignore[arg-type]

    def close(self) -> None:
        self.controller.close()
        self.machine.close()
