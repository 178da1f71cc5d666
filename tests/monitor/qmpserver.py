"""A QMP server in a thread of its own, as `sterna run` has it in its main thread."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sterna.monitor.addresses import MonitorAddress, listen
from sterna.monitor.client import QmpClient
from sterna.monitor.protocol import QmpError
from sterna.monitor.server import QmpServer
from sterna.monitor.session import Execute

TIMEOUT = 300.0


class ServerThread:
    """:ivar emit: sends an event to all clients"""

    def __init__(
        self, execute: Execute, address: MonitorAddress, negotiation_seconds: float = TIMEOUT
    ) -> None:
        self.address = address
        self._execute = execute
        self._negotiation_seconds = negotiation_seconds
        self._listening = listen(address)
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))
        self._thread.start()
        assert self._ready.wait(TIMEOUT)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self.server = QmpServer(self._execute, self._negotiation_seconds)
        self.emit = self.server.emit
        await self.server.serve(self._listening.socket)
        self._ready.set()
        await self._end.wait()
        await self.server.close()
        self._listening.close()

    def raw(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(TIMEOUT)
        connection.connect(self.address.path)
        return connection

    def client(self) -> QmpClient:
        return QmpClient.connect(self.address, TIMEOUT)

    def call_later(self, seconds: float, action: Callable[[], None]) -> None:
        """Have the server's loop do something."""
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, action)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(TIMEOUT)
        assert not self._thread.is_alive()


@contextmanager
def serving(execute: Execute, path: Path, negotiation_seconds: float = TIMEOUT) -> Iterator[ServerThread]:
    server = ServerThread(execute, MonitorAddress("unix", path=str(path)), negotiation_seconds)
    try:
        yield server
    finally:
        server.close()


class SmallTable:
    """A registry that needs no machine.

    :ivar gate: `wait` blocks until it is set
    """

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.waiting = threading.Event()

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        if name == "echo":
            return arguments
        if name == "wait":
            self.waiting.set()
            assert self.gate.wait(TIMEOUT)
            return {}
        if name == "defect":
            raise KeyError("a defect")
        raise QmpError(f"The command {name[:80]} has not been found", "CommandNotFound")
