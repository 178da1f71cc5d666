"""The QMP server: listening sockets, their clients, and events to all of them."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sterna.monitor import protocol
from sterna.monitor.session import NEGOTIATION_SECONDS, Execute, Session

CLIENT_LIMIT = 64


class QmpServer:
    """Serves any number of sockets, up to `CLIENT_LIMIT` clients in all. Lives in one asyncio loop.

    :param negotiation_seconds: as in `Session`
    """

    def __init__(self, execute: Execute, negotiation_seconds: float = NEGOTIATION_SECONDS) -> None:
        self._execute = execute
        self._negotiation_seconds = negotiation_seconds
        # A thread for each client: a command that waits holds up its own client, and no other.
        self._executor = ThreadPoolExecutor(max_workers=CLIENT_LIMIT, thread_name_prefix="qmp")
        self._servers: list[asyncio.Server] = []
        self._sessions: dict[Session, asyncio.Task[Any]] = {}
        self._loop = asyncio.get_running_loop()

    async def serve(self, listening: socket.socket) -> None:
        """Accept clients on a listening socket from now on. The socket is closed with the server."""
        listening.setblocking(False)
        # Both families are stream sockets that listen already.
        start = asyncio.start_unix_server if listening.family == socket.AF_UNIX else asyncio.start_server
        self._servers.append(await start(self._client, sock=listening))

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """Send an event to all clients. Callable from any thread, also after the loop has ended."""
        message = protocol.encode(protocol.event(name, data))
        try:
            self._loop.call_soon_threadsafe(self._broadcast, message)
        except RuntimeError:
            pass  # the loop is closed, nobody listens

    async def close(self) -> None:
        """Stop listening, let clients read what is queued, and disconnect them."""
        for server in self._servers:
            server.close()
        sessions = dict(self._sessions)
        await asyncio.gather(*(session.close() for session in sessions), return_exceptions=True)
        for task in sessions.values():
            task.cancel()
        await asyncio.gather(*sessions.values(), return_exceptions=True)
        # The loop goes on meanwhile: a second signal ends what a command that hangs would hold up.
        await asyncio.to_thread(self._executor.shutdown)

    def _broadcast(self, message: bytes) -> None:
        for session in list(self._sessions):
            session.send_event(message)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._make_room():
            writer.transport.abort()
            return
        session = Session(reader, writer, self._execute, self._executor, self._negotiation_seconds)
        task = asyncio.current_task()
        assert task is not None
        self._sessions[session] = task
        try:
            await session.run()
        finally:
            self._sessions.pop(session, None)
            writer.close()

    def _make_room(self) -> bool:
        """Where there are as many clients as may be, the one that has been silent for longest makes room: it has not negotiated.

        :return: whether there is room
        """
        if len(self._sessions) < CLIENT_LIMIT:
            return True
        silent = next((session for session in self._sessions if not session.negotiated), None)
        if silent is None:
            return False
        del self._sessions[silent]
        silent.drop()
        return True
