"""A small synchronous QMP client, for this program's own commands. No text of a server's makes a terminal do anything."""

import collections
import logging
import socket
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import msgspec

from sterna.host.closing import Closing
from sterna.host.printable import printable
from sterna.monitor.addresses import MonitorAddress, connect, parse_address
from sterna.monitor.errors import MonitorError
from sterna.monitor.framing import FramingError, JsonFramer
from sterna.monitor.protocol import QmpError

log = logging.getLogger(__name__)

_MAX_ANSWER_BYTES = 16 << 20
_MAX_EVENTS = 1000
_MAX_EVENT_BYTES = 1 << 12
_INTEGER_BITS = 64

Answer = TypeVar("Answer")


class ConnectionLost(MonitorError):
    """The other end closed the connection, fell silent, or does not speak QMP; one line."""


class QmpClient(Closing):
    """A negotiated connection. Use it from one thread.

    :param timeout: seconds for each answer, None for ever
    :param greeting_seconds: for the server's greeting, if not `timeout`

    :ivar events: those not taken yet, oldest first, but for the oldest of very many, and those of more than 4 KiB
    :ivar greeting: the server's version information
    """

    def __init__(
        self,
        connection: socket.socket,
        name: str,
        timeout: float | None = 30.0,
        greeting_seconds: float | None = None,
    ) -> None:
        self._socket = connection
        self._name = name
        self._timeout = timeout
        self._framer = JsonFramer(_MAX_ANSWER_BYTES)
        self._messages: collections.deque[dict[str, Any]] = collections.deque()
        self.events: collections.deque[dict[str, Any]] = collections.deque(maxlen=_MAX_EVENTS)
        greeting_seconds = timeout if greeting_seconds is None else greeting_seconds
        try:
            try:
                greeting = self._next_message(_deadline(greeting_seconds))
            except TimeoutError as error:
                raise ConnectionLost(
                    f"{name} accepts connections, and did not greet within {greeting_seconds:g} s: "
                    "does another client hold it (libvirt?), is it no QMP, or has the VM not started?"
                ) from error
            if not isinstance(greeting.get("QMP"), dict):
                raise ConnectionLost(f"{name} does not speak QMP")
            self.greeting: dict[str, Any] = greeting["QMP"]
            try:
                self.command("qmp_capabilities")
            except QmpError as error:
                raise ConnectionLost(f"{name} does not take a client: {error.desc}") from error
        except BaseException:
            connection.close()
            raise

    @classmethod
    def connect(
        cls,
        address: MonitorAddress | str,
        timeout: float | None = 30.0,
        greeting_seconds: float | None = None,
    ) -> "QmpClient":
        """
        :param address: or its text, ``unix:PATH``, ``tcp:HOST:PORT`` or ``fd:N``
        :param timeout: seconds for the connection and for each answer
        :param greeting_seconds: for the server's greeting, if not `timeout`
        :raise AddressError: When it is none, or nobody listens there.
        :raise ConnectionLost: When whoever listens does not speak QMP, or serves another client.
        """
        if isinstance(address, str):
            address = parse_address(address)
        return cls(connect(address, timeout), str(address), timeout, greeting_seconds)

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a command. Underscores in argument names stand for hyphens.

        :return: what the answer returns
        :raise QmpError: When the command fails.
        :raise ConnectionLost: When there is no answer.
        """
        return self.execute(name, {key.replace("_", "-"): value for key, value in arguments.items()})

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """As `command`, with the arguments under their own names."""
        log.debug("to %s: %s %s", self._name, name, arguments)
        try:
            return self._execute(name, arguments)
        except ConnectionLost:
            self.close()  # an answer that comes late is not the next command's
            raise

    def query(self, name: str, kind: type[Answer]) -> Answer:
        """Run a command without arguments.

        :param kind: what the answer has to be (`sterna.monitor.answers`); what it does not name is returned as it came
        :raise QmpError: When the command fails.
        :raise ConnectionLost: When there is no answer, or it is of another kind.
        """
        answer = self.command(name)
        try:
            msgspec.convert(answer, kind)
        except msgspec.ValidationError as error:
            raise ConnectionLost(f"{self._name} does not answer '{name}' as a VM does: {error}") from error
        return cast(Answer, answer)

    def _execute(self, name: str, arguments: dict[str, Any]) -> Any:
        message: dict[str, Any] = {"execute": name}
        if arguments:
            message["arguments"] = arguments
        deadline = _deadline(self._timeout)
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(msgspec.json.encode(message) + b"\n")
        except TimeoutError as error:
            raise ConnectionLost(f"{self._name} does not take '{name}' for {self._timeout:g} s") from error
        except OSError as error:
            raise ConnectionLost(f"{self._name}: {error.strerror or error}") from error
        while True:
            try:
                answer = self._next_message(deadline)
            except TimeoutError as error:
                raise ConnectionLost(
                    f"{self._name} does not answer: '{name}' was sent {self._timeout:g} s ago"
                ) from error
            if "event" in answer:
                self.events.append(answer)
            elif "error" in answer:
                refusal = answer["error"]
                if not isinstance(refusal, dict) or not isinstance(refusal.get("desc"), str):
                    raise ConnectionLost(f"{self._name} does not speak QMP")
                raise QmpError(refusal["desc"], str(refusal.get("class")))
            elif "return" in answer:
                return answer["return"]

    def wait_event(self, wanted: Callable[[dict[str, Any]], bool], timeout: float) -> dict[str, Any]:
        """The next event that is `wanted`; those before it are dropped.

        :raise TimeoutError: When none came in so many seconds.
        :raise ConnectionLost: When the connection ended.
        """
        deadline = _deadline(timeout)
        while True:
            while self.events:
                event = self.events.popleft()
                if wanted(event):
                    return event
            try:
                message = self._next_message(deadline)
            except TimeoutError:
                raise TimeoutError(f"{self._name}: no such event in {timeout:g} s") from None
            if "event" in message:
                self.events.append(message)

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def _next_message(self, deadline: float | None) -> dict[str, Any]:
        """
        :param deadline: when it has to be whole, by time.monotonic; None for ever
        :raise TimeoutError: When it is not.
        """
        while not self._messages:
            try:
                left = None if deadline is None else deadline - time.monotonic()
                if left is not None and left <= 0:
                    raise TimeoutError
                self._socket.settimeout(left)
                data = self._socket.recv(1 << 16)
            except TimeoutError:
                raise
            except OSError as error:
                raise ConnectionLost(f"{self._name}: {error.strerror or error}") from error
            if not data:
                raise ConnectionLost(f"{self._name} closed the connection")
            for text in self._framer.feed(data):
                if isinstance(text, FramingError):
                    raise ConnectionLost(f"{self._name} does not speak QMP") from text
                message = self._decode(text)
                if "event" not in message or len(text) <= _MAX_EVENT_BYTES:
                    self._messages.append(message)
        return self._messages.popleft()

    def _decode(self, text: bytes) -> dict[str, Any]:
        try:
            message = _printable(msgspec.json.decode(text))
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            raise ConnectionLost(f"{self._name} does not speak QMP")
        return message


def _printable(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value, lines=True)
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {printable(name): _printable(item) for name, item in value.items()}
    if isinstance(value, int) and value.bit_length() > _INTEGER_BITS:
        raise ValueError("no integer of QMP's is as long")
    return value


def _deadline(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds
