"""What a monitor controls: a machine, its migrations, and the end of the process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sterna.errors import Error, InternalError
from sterna.migration.controller import MigrationController
from sterna.monitor.protocol import QmpError

if TYPE_CHECKING:
    from sterna.machine.machine import Machine


@dataclass
class Control:
    """The targets of commands.

    :ivar quit: ends the process soon; called with the reason (QEMU's ShutdownCause), from any thread
    :ivar closing: set when the process ends: commands that take long give up
    """

    machine: "Machine"
    migration: MigrationController
    quit: Callable[[str], None]
    closing: threading.Event = field(default_factory=threading.Event)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    @contextmanager
    def command(self, *, waits: bool = False) -> Iterator[None]:
        """The body of a command. Commands of all monitors run one at a time, but for those that wait.

        :param waits: it may wait for a disk, a name service or another machine, or for a command that does; what it calls has
            locks of its own
        :raise QmpError: In place of any error that is the user's or the host's fault.
        """
        try:
            with nullcontext() if waits else self._lock:
                yield
        except (QmpError, InternalError):
            raise
        except (Error, OSError, ValueError) as error:
            raise QmpError(str(error) or type(error).__name__) from error

    def start_incoming(self, uri: str) -> None:
        """Wait for a guest at `uri`.

        :raise QmpError: When this machine was not started to wait for one.
        """
        if self.machine.run_state.value != "inmigrate":
            raise QmpError("'-incoming' was not specified on the command line")
        self.migration.incoming(uri)

    @property
    def running(self) -> bool:
        """Whether the guest runs."""
        return str(self.machine.run_state.value) == "running"
