"""A running guest that always has something to send."""

import time

from sterna.guests.layout import RandomWord, read_status_of_ram
from sterna.machine.migratable import MigratableMachine
from sterna.machine.runstate import RunState
from sterna.memory.bitmap import DirtyBatch

STEPS = 100
"""Each of them writes to a page, one of those that the guest program `random` has."""


class Restless(MigratableMachine):
    """A machine with the guest program `random`, which has made steps whenever its dirty log is looked at, however little
    processor it got: a look waits for them. A pass after which nothing is dirty would be the last.
    """

    _seen = 0

    def harvest(self) -> list[DirtyBatch]:
        while self.machine.run_state is RunState.RUNNING:
            status = read_status_of_ram(self.ram_blocks[0].data)
            steps = sum(status.word(cpu, RandomWord.STEPS) for cpu in range(status.cpus))
            if steps >= self._seen + STEPS:
                self._seen = steps
                break
            time.sleep(0.001)
        return super().harvest()
