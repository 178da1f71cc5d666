"""One connection through the proxy: two channels, and a thread for each direction between them."""

import threading
import time
from collections.abc import Callable
from enum import Enum

from sterna.analysis.proxy.answers import Answers
from sterna.analysis.proxy.tee import HEAD_BYTES, RING_BYTES, Tee
from sterna.migration import outcome_query
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.errors import Cancelled, ChannelError
from sterna.stream import wire
from sterna.stream.multifd.format import INIT_BYTES, MAGIC

_BACK_RING_BYTES = 64 << 10
_LINGER_SECONDS = 5.0
LAST_WORD_SECONDS = 60.0
"""How long one end may take for its last word when the other has said its own."""


class ConnectionKind(Enum):
    """What a connection carries, by its first bytes."""

    UNKNOWN = "unknown"
    """Too few bytes have come to tell."""
    MAIN = "main"
    CHANNEL = "channel"
    """A channel of multifd, which has said its whole initial packet."""
    QUESTION = "question"
    """A sterna asks who runs a guest (`sterna.migration.outcome_query`)."""
    OTHER = "other"
    """Nothing that is known here, such as TLS."""


_OPENINGS = {
    wire.MAGIC.to_bytes(4, "big"): ConnectionKind.MAIN,
    MAGIC.to_bytes(4, "big"): ConnectionKind.CHANNEL,
    outcome_query.QUESTION[:4]: ConnectionKind.QUESTION,
}


def _kind_of(head: bytes) -> ConnectionKind:
    if len(head) < 4:
        return ConnectionKind.UNKNOWN
    kind = _OPENINGS.get(head[:4], ConnectionKind.OTHER)
    return ConnectionKind.UNKNOWN if kind is ConnectionKind.CHANNEL and len(head) < INIT_BYTES else kind


class End(Enum):
    """How a direction ended."""

    CLOSED = "closed"
    """The side that writes closed it in order."""
    SENDER_LOST = "sender lost"
    RECEIVER_LOST = "receiver lost"
    CANCELLED = "cancelled"


class Connection:
    """Forwards between `near`, the source's side, and `far`, the destination's.

    :param identified: called once, in the forwarding thread, when the kind is known
    :param bell: called when there is something to read on the tee
    :param ring_bytes: how far those who look at what goes forward may fall behind it

    :ivar tee: what goes forward
    :ivar opening: its first bytes, as many as it took to tell the kind
    :ivar back: what comes back
    :ivar answers: the messages in that
    :ivar forward_end: how the direction to the destination ended, None while it has not
    :ivar backward_end: the other one
    :ivar first_end: what ended first, in words
    :ivar over: both have ended, and the channels are closed; set by who ran it
    :ivar forward_ended_ns: CLOCK_MONOTONIC when the direction to the destination ended, 0 before
    """

    def __init__(
        self,
        near: SocketChannel,
        far: SocketChannel,
        identified: Callable[["Connection"], None],
        bell: Callable[[], None] = lambda: None,
        ring_bytes: int = RING_BYTES,
    ) -> None:
        self.near, self.far = near, far
        self.tee = Tee(ring_bytes, bell=bell)
        self.back = Tee(_BACK_RING_BYTES)
        self.answers = Answers()
        self.kind = ConnectionKind.UNKNOWN
        self.opening = b""
        self.started_ns = time.monotonic_ns()
        self.forward_end: End | None = None
        self.backward_end: End | None = None
        self.first_end = ""
        self.over = False
        self.forward_ended_ns = 0
        self._identified = identified
        self._lock = threading.Lock()
        self._forwarded = threading.Event()

    def run(self) -> None:
        """Forward until both directions have ended; then both channels are closed."""
        back = threading.Thread(target=self._return, name="proxy-back", daemon=True)
        try:
            back.start()
        except RuntimeError:  # the operating system has no thread to spare
            self.tee.end()
            self.back.end()
            self.near.close()
            self.far.close()
            return
        try:
            self._forward()
        finally:
            self.tee.end()
            if self.kind is ConnectionKind.UNKNOWN and self.tee.head:
                self._identify(ConnectionKind.OTHER)
            self._forwarded.set()
            if self.forward_end is not End.CANCELLED:
                self.far.end_writing()
                # Where the connection is broken, nobody is left to hear the destination, or to be heard.
                back.join(LAST_WORD_SECONDS if self.forward_end is End.CLOSED else _LINGER_SECONDS)
                self.far.shut_down()
            back.join()
            if self.forward_end is End.RECEIVER_LOST:
                # The destination's last words reach the source before it hears that the connection is gone.
                self._quietly(self.near.drain)
            self.near.close()
            self.far.close()

    def cut(self) -> None:
        """End both directions, from whichever thread."""
        self.near.shut_down()
        self.far.shut_down()

    def _forward(self) -> None:
        end = End.CANCELLED
        try:
            end = self._pump("forward_end", self.near, self.far, self.tee, self._recognise)
        finally:
            self._note_end("forward_end", end)

    def _pump(
        self,
        name: str,
        sender: SocketChannel,
        receiver: SocketChannel,
        tee: Tee,
        look: Callable[[memoryview], None],
    ) -> End:
        """Hand on what one end sends.

        :param name: of the direction's end
        :param look: gets each piece before it is handed on
        """
        try:
            while True:
                room = tee.room()
                try:
                    got = sender.readinto(room)
                except ChannelError:
                    return End.SENDER_LOST
                if not got:
                    self._note_end(name, End.CLOSED)
                    receiver.end_writing()
                    return End.CLOSED
                look(room[:got])
                before = receiver.transferred
                try:
                    receiver.send(room[:got])
                except ChannelError:
                    return End.RECEIVER_LOST
                finally:
                    tee.commit(receiver.transferred - before)
        except Cancelled:
            return End.CANCELLED

    def _recognise(self, data: memoryview) -> None:
        """Before the destination can answer."""
        if self.kind is ConnectionKind.UNKNOWN:
            self.opening = (self.tee.head + bytes(data[:HEAD_BYTES]))[:HEAD_BYTES]
            kind = _kind_of(self.opening)
            if kind is not ConnectionKind.UNKNOWN:
                self._identify(kind)

    def _identify(self, kind: ConnectionKind) -> None:
        self.kind = kind
        self._identified(self)

    def _return(self) -> None:
        end = End.CANCELLED
        try:
            # Looked at before the source can act on it: what it does then comes after the destination's decision.
            end = self._pump("backward_end", self.far, self.near, self.back, self.answers.feed)
        finally:
            self.back.end()
            self._note_end("backward_end", end)
            if end is End.SENDER_LOST:
                # Whatever the source writes now, nobody reads it.
                self.near.end_writing()
            if end is not End.CANCELLED:
                self._await_source()

    def _await_source(self) -> None:
        """The destination has said its last word: see that the source, if it sends nothing more, ends its direction too."""
        before = -1
        while before != self.tee.forwarded:
            before = self.tee.forwarded
            if self._forwarded.wait(LAST_WORD_SECONDS):
                return
        self.near.stop_reading()

    def _note_end(self, name: str, end: End) -> None:
        with self._lock:
            setattr(self, name, end)
            if name == "forward_end":
                self.forward_ended_ns = self.forward_ended_ns or time.monotonic_ns()
            if not self.first_end and end is not End.CANCELLED:
                self.first_end = _WHO[name, end]

    def _quietly(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (ChannelError, Cancelled):
            pass


_WHO = {
    ("forward_end", End.CLOSED): "the source closed the connection",
    ("forward_end", End.SENDER_LOST): "the connection to the source broke",
    ("forward_end", End.RECEIVER_LOST): "the connection to the destination broke",
    ("backward_end", End.CLOSED): "the destination closed the connection",
    ("backward_end", End.SENDER_LOST): "the connection to the destination broke",
    ("backward_end", End.RECEIVER_LOST): "the connection to the source broke",
}
