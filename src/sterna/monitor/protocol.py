"""QMP messages: requests, answers, errors, events (QEMU's docs/interop/qmp-spec)."""

import time
from dataclasses import dataclass
from typing import Any

import msgspec

from sterna.host.messages import Flaw, flaw
from sterna.monitor.errors import MonitorError
from sterna.version import VERSION

QEMU_VERSION = {"major": 7, "minor": 2, "micro": 0}
"""The version whose commands and types we follow."""

PACKAGE = f"sterna {VERSION}"

GREETING: dict[str, Any] = {
    "QMP": {"version": {"qemu": QEMU_VERSION, "package": PACKAGE}, "capabilities": []}
}


class QmpError(MonitorError):
    """A command that fails; becomes a QMP error.

    :ivar desc: one line for people
    :ivar error_class: GenericError or CommandNotFound
    """

    def __init__(self, desc: str, error_class: str = "GenericError") -> None:
        super().__init__(desc)
        self.desc = desc
        self.error_class = error_class


@dataclass(frozen=True)
class Request:
    """A command as it arrived; `has_id` tells an absent id from null."""

    execute: str
    arguments: dict[str, Any]
    id: Any = None
    has_id: bool = False


class RequestError(QmpError):
    """A message that is no command; carries the id where there is one."""

    def __init__(self, desc: str, message: dict[str, Any] | None = None) -> None:
        super().__init__(desc)
        self.message = message or {}


class NoObjectError(RequestError):
    """A message that is no JSON object."""


_MEMBERS = {"execute", "arguments", "id"}


def parse_request(text: bytes) -> Request:
    """Decode one message.

    :raise NoObjectError: When it is not JSON, or no object.
    :raise RequestError: When it is no command; the texts are QEMU's.
    """
    try:
        message = msgspec.json.decode(text)
    except (ValueError, RecursionError) as error:
        raise NoObjectError(f"JSON parse error, {error}") from error
    if not isinstance(message, dict):
        raise NoObjectError("QMP input must be a JSON object")
    for member in message:
        if member not in _MEMBERS:
            raise RequestError(f"QMP input member '{member[:80]}' is unexpected", message)
    if "execute" not in message:
        raise RequestError("QMP input lacks member 'execute'", message)
    if not isinstance(message["execute"], str):
        raise RequestError("QMP input member 'execute' must be a string", message)
    arguments = message.get("arguments", {})
    if not isinstance(arguments, dict):
        raise RequestError("QMP input member 'arguments' must be an object", message)
    return Request(message["execute"], arguments, message.get("id"), "id" in message)


def encode(message: dict[str, Any]) -> bytes:
    """A message on the wire: one line."""
    return msgspec.json.encode(message) + b"\r\n"


def error_reply(error: QmpError) -> dict[str, Any]:
    return {"error": {"class": error.error_class, "desc": error.desc}}


def event(name: str, data: dict[str, Any]) -> dict[str, Any]:
    """An event that happens now."""
    now_us = time.time_ns() // 1000
    message: dict[str, Any] = {
        "timestamp": {"seconds": now_us // 1_000_000, "microseconds": now_us % 1_000_000},
        "event": name,
    }
    if data:
        message["data"] = data
    return message


_QAPI_TYPES = {"str": "string", "int": "integer", "bool": "boolean", "object": "object", "array": "array"}


def convert_arguments(arguments: dict[str, Any], schema: type[msgspec.Struct]) -> Any:
    """Check a command's arguments against their declaration.

    :return: an instance of `schema`
    :raise QmpError: When one is unknown, missing or of the wrong type; it names the argument in QEMU's words.
    """
    try:
        return msgspec.convert(arguments, schema)
    except msgspec.ValidationError as error:
        raise QmpError(_describe(flaw(error))) from error


def _describe(flaw: Flaw) -> str:
    if flaw.unknown is not None:
        return f"Parameter '{flaw.unknown}' is unexpected"
    if flaw.missing is not None:
        return f"Parameter '{flaw.missing}' is missing"
    if flaw.expected is not None:
        expected = _QAPI_TYPES.get(flaw.expected.removesuffix(" | null"), flaw.expected)
        return f"Invalid parameter type for '{flaw.place}', expected: {expected}"
    return f"Parameter '{flaw.place}': {flaw.reason[:200]}"
