"""Messages from the destination back to the source: type and length in 16 bits each, then the payload.

QEMU ends the return path at a type it does not know; types of one's own go only to a peer that asked for
them.
"""

from dataclasses import dataclass

from sterna.stream.wire import NAME_LIMIT, RETURN_PATH_LIMIT, ReturnPathType, StreamError

PRIVATE_TYPES = range(0x8000, 0x10000)
"""Types that QEMU does not use, for messages between two peers that agreed on them."""

_PAYLOAD_BYTES = {
    ReturnPathType.SHUT: (4, 4),
    ReturnPathType.PONG: (4, 4),
    ReturnPathType.REQ_PAGES_ID: (14, 13 + NAME_LIMIT),
    ReturnPathType.REQ_PAGES: (12, 12),
    ReturnPathType.RECV_BITMAP: (2, 1 + NAME_LIMIT),
    ReturnPathType.RESUME_ACK: (4, 4),
    ReturnPathType.SWITCHOVER_ACK: (0, 0),
}
_HEADER_BYTES = 4
_SECTION = "return path"


@dataclass(frozen=True)
class ReturnMessage:
    """One message.

    :ivar type: a `ReturnPathType`, or one of `PRIVATE_TYPES`
    """

    type: int
    payload: bytes = b""

    def encode(self) -> bytes:
        """The message on the wire.

        :raise StreamError: When the type is unknown, or the payload has a length that the type cannot have.
        """
        _check(self.type, len(self.payload))
        return self.type.to_bytes(2, "big") + len(self.payload).to_bytes(2, "big") + self.payload

    @property
    def value(self) -> int:
        """The number that SHUT, PONG and RESUME_ACK carry."""
        return int.from_bytes(self.payload[:4], "big")


def shut(status: int) -> ReturnMessage:
    """The destination says nothing more.

    :param status: 0 when it runs the guest, anything else (32 bits) when the migration failed
    """
    return ReturnMessage(ReturnPathType.SHUT, status.to_bytes(4, "big"))


def pong(value: int) -> ReturnMessage:
    """The answer to the command PING with the same 32-bit value."""
    return ReturnMessage(ReturnPathType.PONG, value.to_bytes(4, "big"))


class ReturnPathDecoder:
    """Takes messages from bytes as they come in, in pieces of any size. After an error it cannot go on."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self._offset = 0
        self._error: StreamError | None = None

    def feed(self, data: bytes | bytearray | memoryview) -> list[ReturnMessage]:
        """The messages that `data` completes.

        :raise StreamError: When a message has an unknown type or an impossible length, as soon as its header
            is there. If messages came before it in `data`, they are returned, and `check` and the next call raise.
        """
        self.check()
        self._pending += data
        messages: list[ReturnMessage] = []
        at = 0
        while len(self._pending) - at >= _HEADER_BYTES:
            kind = int.from_bytes(self._pending[at : at + 2], "big")
            size = int.from_bytes(self._pending[at + 2 : at + 4], "big")
            try:
                _check(kind, size, self._offset + at)
            except StreamError as error:
                self._error = error
                if not messages:
                    raise
                break
            if len(self._pending) - at < _HEADER_BYTES + size:
                break
            at += _HEADER_BYTES
            messages.append(ReturnMessage(kind, bytes(self._pending[at : at + size])))
            at += size
        del self._pending[:at]
        self._offset += at
        return messages

    def check(self) -> None:
        """Look whether there is anything wrong with what came after the messages returned so far.

        :raise StreamError: When there is.
        """
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """There are no more bytes.

        :raise StreamError: When the last message is cut short, or something was wrong before.
        """
        self.check()
        if self._pending:
            end = self._offset + len(self._pending)
            raise StreamError("the return path is cut short within a message", _SECTION, end)


def _check(kind: int, size: int, offset: int | None = None) -> None:
    if kind in PRIVATE_TYPES:
        if size > RETURN_PATH_LIMIT:
            raise StreamError(
                f"a message of type {kind:#x} with {size} bytes, the limit is {RETURN_PATH_LIMIT}",
                _SECTION,
                offset,
            )
        return
    if kind not in ReturnPathType.__members__.values():
        raise StreamError(f"a message of unknown type {kind:#x}", _SECTION, offset)
    least, most = _PAYLOAD_BYTES[ReturnPathType(kind)]
    if not least <= size <= most:
        raise StreamError(f"{ReturnPathType(kind).name} with {size} bytes of payload", _SECTION, offset)
