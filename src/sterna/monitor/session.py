"""One QMP client: negotiation, its commands in order, and events, in bounded memory.

A web page can have a browser send HTTP to a port of this host, with lines of JSON in it. So a connection whose first message
is no JSON object, as HTTP's first line is not, ends there.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Any

from sterna.monitor import protocol
from sterna.monitor.framing import FramingError, JsonFramer
from sterna.monitor.protocol import NoObjectError, QmpError, Request, RequestError

_READ_BYTES = 1 << 16
UNREAD_LIMIT_BYTES = 1 << 20
"""A client that leaves so much unread is disconnected at the next event."""

NEGOTIATION_SECONDS = 60.0
"""How long a client may take to negotiate: people type it."""
_CLOSE_SECONDS = 2.0


Execute = Callable[[str, dict[str, Any]], Any]
"""Runs a command by its name on the caller's thread, or raises `QmpError`."""


@dataclass(eq=False)
class Session:
    """One client.

    :param executor: where commands run, so that none holds up the others' connections
    :param negotiation_seconds: a client that has not negotiated by then is disconnected

    :ivar negotiated: it is a QMP client: it has been given its capabilities
    """

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    execute: Execute
    executor: Executor
    negotiation_seconds: float
    negotiated: bool = False
    _framer: JsonFramer = field(default_factory=JsonFramer)
    _patience: asyncio.Timeout | None = None
    _answering: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def run(self) -> None:
        """Serve the client until it leaves. Errors of its connection end the session, no more."""
        try:
            async with asyncio.timeout(self.negotiation_seconds) as self._patience:
                await self._send(protocol.GREETING)
                while data := await self.reader.read(_READ_BYTES):
                    for text in self._framer.feed(data):
                        async with self._answering:
                            go_on = await self._answer(text)
                        if not go_on:
                            return
        except (TimeoutError, ConnectionError, OSError):
            pass  # the client is gone, or never was one

    def drop(self) -> None:
        """Disconnect without a word."""
        self.writer.transport.abort()

    def send_event(self, message: bytes) -> None:
        """Queue an encoded event; before negotiation there are none."""
        if not self.negotiated or self.writer.is_closing():
            return
        if self.writer.transport.get_write_buffer_size() > UNREAD_LIMIT_BYTES:
            self.drop()
            return
        self.writer.write(message)

    async def close(self) -> None:
        """Let a command that runs be answered and the client read what is queued, for a moment, and close."""
        try:
            async with asyncio.timeout(_CLOSE_SECONDS), self._answering:
                await self.writer.drain()
        except (TimeoutError, ConnectionError, OSError):
            self.drop()
        self.writer.close()

    async def _send(self, message: dict[str, Any]) -> None:
        self.writer.write(protocol.encode(message))
        # A client that does not read is not read from either.
        await self.writer.drain()

    async def _answer(self, text: bytes | FramingError) -> bool:
        """:return: whether the session goes on"""
        if isinstance(text, FramingError):
            await self._send(protocol.error_reply(QmpError(str(text))))
            return self.negotiated and not text.fatal
        go_on = True
        reply: dict[str, Any]
        identified: dict[str, Any] = {}
        try:
            request = protocol.parse_request(text)
            if request.has_id:
                identified["id"] = request.id
            reply = {"return": await self._run(request)}
        except RequestError as error:
            go_on = self.negotiated or not isinstance(error, NoObjectError)
            reply = protocol.error_reply(error)
            if "id" in error.message:
                identified["id"] = error.message["id"]
        except QmpError as error:
            reply = protocol.error_reply(error)
        await self._send(reply | identified)
        return go_on

    async def _run(self, request: Request) -> Any:
        if request.execute == "qmp_capabilities":
            return self._negotiate(request.arguments)
        if not self.negotiated:
            raise QmpError(
                "Expecting capabilities negotiation with 'qmp_capabilities'", error_class="CommandNotFound"
            )
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self.executor, self.execute, request.execute, request.arguments)
        except QmpError:
            raise
        except Exception as error:
            # A defect of ours in one command must not take the guest down.
            raise QmpError(
                f"internal error in '{request.execute}': {type(error).__name__}: {error}"
            ) from error

    def _negotiate(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self.negotiated:
            raise QmpError(
                "Capabilities negotiation is already complete, command ignored",
                error_class="CommandNotFound",
            )
        for name in arguments:
            if name != "enable":
                raise QmpError(f"Parameter '{name[:80]}' is unexpected")
        enable = arguments.get("enable", [])
        if not isinstance(enable, list):
            raise QmpError("Invalid parameter type for 'enable', expected: array")
        if enable:
            raise QmpError(f"Capability {str(enable[0])[:80]} is not available")
        self.negotiated = True
        if self._patience is not None:
            self._patience.reschedule(None)
        return {}
