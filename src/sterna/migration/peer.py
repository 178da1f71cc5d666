"""The source's view of the destination: what comes back from it, and the steps of handing over a guest."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from sterna.migration import handshake
from sterna.migration.channels.channel import Channel
from sterna.migration.errors import Cancelled, ChannelError, ProtocolError, Refused
from sterna.migration.handshake import (
    Hello,
    Nack,
    PrivateCommand,
    PrivateMessage,
    Ready,
    Running,
)
from sterna.migration.process import ProcessIdentity
from sterna.stream import sections
from sterna.stream.return_path import ReturnMessage, ReturnPathDecoder
from sterna.stream.wire import Command, ReturnPathType, StreamError

GREETING_SECONDS = 30.0
"""How long a peer on a two-way channel may take to answer the greeting. QEMU and sterna answer at once."""

_REASON_SECONDS = 1.0


class PeerKind(Enum):
    """What the destination is."""

    SILENT = ""
    """A one-way channel: nobody answers."""
    QEMU = "qemu"
    STERNA = "sterna"


class NackError(Refused):
    """The destination refused, with details."""

    def __init__(self, nack: Nack) -> None:
        super().__init__(f"destination refused: {nack.reason}")
        self.nack = nack


class ShutError(Refused):
    """The destination closed the return path with an error."""


@dataclass(frozen=True)
class Greeted:
    """What the greeting found out.

    :ivar clock_offset_ns: the destination's CLOCK_REALTIME minus ours, 0 when within the measuring error
    :ivar round_trip_seconds: from the greeting to its answer
    :ivar host: what the destination has for a guest, by the names of `sterna.hypervisor.traits`
    :ivar process: the destination's process, if it states one
    """

    kind: PeerKind
    features: frozenset[str] = frozenset()
    clock_offset_ns: int = 0
    round_trip_seconds: float = 0.0
    host: Mapping[str, int] = field(default_factory=dict)
    process: ProcessIdentity | None = None


class Peer:
    """The other end of a source's channel.

    :ivar handlers: by type, what is done with a message that may come while others are waited for; whether that is all
    """

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._decoder = ReturnPathDecoder()
        self._messages: deque[ReturnMessage] = deque()
        self._buffer = bytearray(1 << 16)
        self._is_sterna = False
        self._pinged = 0
        self.handlers: dict[int, Callable[[ReturnMessage], bool]] = {
            PrivateMessage.NACK: self._take_nack,
            ReturnPathType.SHUT: self._take_shut,
            ReturnPathType.PONG: self._answers_a_ping,
        }

    # -- what comes back -------------------------------------------------------------------------------------

    def check(self) -> None:
        """Look, without waiting, whether the destination has given up. While the stream is sent nothing else
        may come from it; one read is as much as a destination that talks on can make of it.

        :raise Refused: When it has; the text carries its reason.
        :raise ProtocolError: When it sent anything else.
        :raise ChannelError: When the connection is gone.
        """
        if not self._channel.two_way:
            return
        if not self._messages:
            self._decoder.check()
            # What the destination said before it went away is read before its going.
            got = self._channel.readinto_now(memoryview(self._buffer))
            if got is not None:
                self._take(got)
        self._take_answers()

    def explain(self, error: ChannelError) -> Exception:
        """The reason that the destination gave before the channel broke, or else the breaking itself."""
        try:
            if not self._messages:
                # Where another channel broke, the reason may be on its way on this one.
                self._channel.wait_readable(_REASON_SECONDS)
            self.check()
        except Refused as refused:
            return refused
        except (ChannelError, ProtocolError, StreamError):
            pass
        if self._is_sterna or not self._channel.two_way:
            return error
        return ChannelError(f"{error}; if it is a QEMU, its standard error says why")

    def wait(self, seconds: float | None = None) -> ReturnMessage:
        """The next message.

        :param seconds: how long the answer to the greeting may take; other waits end with the switchover's time limit
        :raise Refused: When it is a refusal.
        :raise ChannelError: When the connection ends, or nothing comes in so many seconds.
        """
        deadline = None if seconds is None else time.monotonic() + seconds
        while (message := self.next_now()) is None:
            left = None if deadline is None else deadline - time.monotonic()
            if not self._channel.wait_readable(left):
                raise ChannelError(
                    f"{self._channel.peer} accepted the connection and did not answer the greeting within {seconds:.1f} s: "
                    "is it the destination of a migration?"
                )
        return message

    def next_now(self) -> ReturnMessage | None:
        """As `wait`, and None when no message has come."""
        while True:
            while not self._messages:
                self._decoder.check()
                got = self._channel.readinto_now(memoryview(self._buffer))
                if got is None:
                    return None
                self._take(got)
            message = self._messages.popleft()
            if not self._is_handled(message):
                return message

    def move(self, channel: Channel) -> None:
        """The connection goes on as this channel."""
        self._channel = channel

    def _take_answers(self) -> int:
        """Take what has come while the stream is sent: answers to pings, and what else has a handler.

        :return: the last ping answered, 0 for none
        """
        answered = 0
        while self._messages:
            message = self._messages.popleft()
            if not self._is_handled(message):
                raise ProtocolError(
                    f"{self._channel.peer} sent a message of type {message.type:#x} out of turn"
                )
            if message.type == ReturnPathType.PONG:
                answered = message.value
        return answered

    def _is_handled(self, message: ReturnMessage) -> bool:
        handle = self.handlers.get(message.type)
        return handle is not None and handle(message)

    def _answers_a_ping(self, message: ReturnMessage) -> bool:
        """Whether it is an answer that was asked for, and then not waited for."""
        return 0 < message.value <= self._pinged

    def _take(self, got: int) -> None:
        if got == 0:
            self._decoder.close()
            raise ChannelError(f"{self._channel.peer} closed the connection")
        self._messages.extend(self._decoder.feed(memoryview(self._buffer)[:got]))

    def _take_nack(self, message: ReturnMessage) -> bool:
        raise NackError(handshake.decode(message.payload, Nack))

    def _take_shut(self, message: ReturnMessage) -> bool:
        if message.value:
            raise ShutError("destination refused: it could not load the guest")
        return False

    def _expect(self, kind: PrivateMessage) -> bytes:
        message = self.wait()
        if message.type != kind:
            raise ProtocolError(
                f"{self._channel.peer} sent a message of type {message.type:#x} instead of {kind.name}"
            )
        return message.payload

    # -- the steps -------------------------------------------------------------------------------------------

    def greet(self) -> Greeted:
        """Open the return path and find out who is there.

        :raise ChannelError: When nobody answers.
        """
        if not self._channel.two_way:
            return Greeted(PeerKind.SILENT)
        ping = handshake.GREETING.to_bytes(4, "big")
        sent_ns = time.time_ns()
        self._channel.send(sections.command(Command.OPEN_RETURN_PATH) + sections.command(Command.PING, ping))
        message = self.wait(GREETING_SECONDS)
        received_ns = time.time_ns()
        round_trip = (received_ns - sent_ns) / 1e9
        greeted = Greeted(PeerKind.QEMU, round_trip_seconds=round_trip)
        if message.type == PrivateMessage.HELLO:
            hello = handshake.decode(message.payload, Hello)
            missing = set(handshake.FEATURES) - set(hello.features)
            if hello.version != handshake.VERSION or missing:
                raise ProtocolError(
                    f"{self._channel.peer} speaks version {hello.version} of the handover "
                    f"without {', '.join(sorted(missing)) or 'nothing'}; here it is {handshake.VERSION}"
                )
            offset = handshake.clock_offset(sent_ns, received_ns, hello.clock_ns)
            self._is_sterna = True
            greeted = Greeted(
                PeerKind.STERNA, frozenset(hello.features), offset, round_trip, hello.host, hello.process
            )
            message = self.wait(GREETING_SECONDS)
        if message.type != ReturnPathType.PONG or message.value != handshake.GREETING:
            raise ProtocolError(f"{self._channel.peer} answered the greeting with type {message.type:#x}")
        return greeted

    def offer(self, offer: handshake.Offer) -> None:
        """Name the migration to a sterna."""
        self._channel.send(sections.command(PrivateCommand.OFFER, handshake.encode(offer)))

    def ping(self, value: int) -> int:
        """Have the destination answer when it has taken in all that was sent so far; `ponged` waits for it.

        :param value: more than that of the ping before, and less than the greeting's
        :return: bytes sent
        """
        assert self._pinged < value < handshake.GREETING
        self._pinged = value
        data = sections.command(Command.PING, value.to_bytes(4, "big"))
        self._channel.send(data)
        return len(data)

    def ponged(self, value: int, seconds: float) -> bool:
        """Wait for the answer to a ping, but no longer than so many seconds.

        :return: whether it came
        :raise Refused, ProtocolError, ChannelError: As `check`.
        """
        if not self._messages:
            self._decoder.check()
            if not self._channel.wait_readable(seconds):
                return False
            self._take(self._channel.readinto(memoryview(self._buffer)))
        return self._take_answers() == value

    def wait_ready(self) -> Ready:
        """Wait until a sterna has received, verified and loaded everything."""
        return handshake.decode(self._expect(PrivateMessage.READY), Ready)

    def wait_running(self) -> Running:
        """Wait until a sterna runs the guest."""
        return handshake.decode(self._expect(PrivateMessage.RUNNING), Running)

    def await_loading(self) -> None:
        """Wait until the destination has loaded all that was sent so far.

        :raise Refused, ProtocolError, ChannelError: As `check`.
        """
        value = self._pinged + 1
        self.ping(value)
        while not self.ponged(value, _REASON_SECONDS):
            pass

    def wait_shut(self) -> None:
        """Wait until QEMU has the guest.

        :raise ShutError: When it says that something went wrong.
        """
        message = self.wait()
        if message.type != ReturnPathType.SHUT:
            raise ProtocolError(f"{self._channel.peer} sent a message of type {message.type:#x}")

    def confirm(self) -> None:
        """Tell a sterna that its RUNNING arrived; if this gets lost, it only keeps its listener longer."""
        try:
            self._channel.send(sections.command(PrivateCommand.CONFIRM))
        except (ChannelError, Cancelled):
            pass
