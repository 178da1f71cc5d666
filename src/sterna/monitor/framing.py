"""Cutting a stream of bytes into JSON texts, in bounded memory."""

import re
from collections.abc import Iterator

from sterna.monitor.errors import MonitorError

MAX_MESSAGE_BYTES = 1 << 20
MAX_DEPTH = 256
"""msgspec decodes recursively; deeper texts are refused before it sees them."""

_OUTSIDE = re.compile(rb'["\[\]{}\n]')
_IN_STRING = re.compile(rb'["\\\n]')


class FramingError(MonitorError):
    """The bytes are no sequence of JSON texts.

    :ivar fatal: nothing that follows can be told apart; close the connection
    """

    def __init__(self, message: str, *, fatal: bool = False) -> None:
        super().__init__(message)
        self.fatal = fatal


class JsonFramer:
    """Collects bytes and gives whole JSON objects or arrays back, wherever lines end. A line that holds
    neither is given as it is; after a line that is cut in a string the rest is dropped up to the next line.

    :param max_bytes: the longest text
    """

    def __init__(self, max_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._max = max_bytes
        self._buffer = bytearray()
        self._position = 0
        self._depth = 0
        self._in_string = False
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes | FramingError]:
        """Whole texts in `data` and what was kept; also what is wrong with it, in order."""
        self._buffer += data
        while True:
            try:
                text = self._next()
            except FramingError as error:
                yield error
                if error.fatal:
                    return
                continue
            if text is None:
                break
            if text.strip():
                yield text
        if len(self._buffer) > self._max:
            self._buffer.clear()
            yield FramingError(f"JSON text of more than {self._max} bytes", fatal=True)

    def _next(self) -> bytes | None:
        if self._skipping and not self._skip_line():
            return None
        while True:
            if self._in_string:
                if not self._string():
                    return None
                continue
            match = _OUTSIDE.search(self._buffer, self._position)
            if match is None:
                self._position = len(self._buffer)
                return None
            self._position = match.end()
            char = match[0]
            if char == b'"':
                self._in_string = True
            elif char == b"\n":
                if self._depth == 0:
                    return self._take()
            elif char in b"[{":
                self._depth += 1
                if self._depth > MAX_DEPTH:
                    self._drop_line()
                    raise FramingError("JSON nesting depth limit exceeded")
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return self._take()

    def _string(self) -> bool:
        """Go to the string's end; False when it has not come yet."""
        match = _IN_STRING.search(self._buffer, self._position)
        if match is None:
            self._position = len(self._buffer)
            return False
        if match[0] == b"\\":
            if match.end() == len(self._buffer):
                self._position = match.start()
                return False
            self._position = match.end() + 1
        elif match[0] == b'"':
            self._position = match.end()
            self._in_string = False
        else:
            self._position = match.start()
            self._drop_line()
            raise FramingError("JSON parse error, a string does not end on its line")
        return True

    def _take(self) -> bytes:
        text = bytes(self._buffer[: self._position])
        self._reset()
        return text

    def _drop_line(self) -> None:
        self._reset()
        self._skipping = True

    def _skip_line(self) -> bool:
        end = self._buffer.find(b"\n")
        if end < 0:
            self._buffer.clear()
            return False
        del self._buffer[: end + 1]
        self._skipping = False
        return True

    def _reset(self) -> None:
        del self._buffer[: self._position]
        self._position = 0
        self._depth = 0
        self._in_string = False
