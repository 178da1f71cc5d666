"""What a destination says on the return path, as the proxy overhears it."""

import time
from collections import Counter

from sterna.migration import handshake
from sterna.migration.errors import ProtocolError
from sterna.migration.handshake import Nack, PrivateMessage
from sterna.stream.return_path import ReturnMessage, ReturnPathDecoder
from sterna.stream.wire import ReturnPathType, StreamError


class Answers:
    """Messages on their way back to the source.

    :ivar counts: of each type, by name
    :ivar shut: the status of SHUT, None before it came
    :ivar refusal: why the destination refused; empty when it did not, or did not say
    :ivar runs: the destination, a sterna, runs the guest
    :ivar decided_ns: CLOCK_MONOTONIC when the destination said how it ended, 0 before
    :ivar fault: what cannot be understood, if anything; nothing after it was looked at
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.shut: int | None = None
        self.refusal = ""
        self.runs = False
        self.decided_ns = 0
        self.fault: StreamError | None = None
        self._decoder = ReturnPathDecoder()

    def feed(self, data: memoryview) -> None:
        """Take the next bytes. Does not raise: a proxy forwards what it does not understand."""
        if self.fault is not None:
            return
        try:
            for message in self._decoder.feed(data):
                self._note(message)
        except StreamError as error:
            self.fault = error

    def _note(self, message: ReturnMessage) -> None:
        kinds = (ReturnPathType, PrivateMessage)
        known = [kind(message.type).name for kind in kinds if message.type in kind.__members__.values()]
        self.counts[known[0] if known else f"{message.type:#x}"] += 1
        match message.type:
            case ReturnPathType.SHUT:
                self.shut = message.value
            case PrivateMessage.RUNNING:
                self.runs = True
            case PrivateMessage.NACK:
                try:
                    self.refusal = handshake.decode(message.payload, Nack).reason
                except ProtocolError:
                    self.refusal = "for a reason that cannot be read"
            case _:
                return
        self.decided_ns = time.monotonic_ns()
