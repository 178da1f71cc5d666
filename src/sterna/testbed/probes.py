"""What a server sees of a guest over the network: pings at a steady pace, and a session of requests and answers."""

import contextlib
import errno
import os
import secrets
import select
import socket
import struct
import threading
import time
from abc import abstractmethod
from collections.abc import Callable

from sterna.host.closing import Closing
from sterna.launch.host import Host
from sterna.testbed.errors import BedError
from sterna.testbed.evidence import Exchange, Ping

ECHO_PORT = 7
_ECHO_REQUEST, _ECHO_REPLY = 8, 0
_ICMP = struct.Struct("!BBHHH")
_NUMBER = struct.Struct("!I")
_NONCE_BYTES = 8
_PATIENCE_S = 0.2
_LATE_S = 5.0
"""How long the answer to the last ping is waited for."""
_DATAGRAM_BYTES = 2048
_LOST = (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EHOSTDOWN, errno.ENOBUFS)


class Probe(Closing):
    """Sends from a host, on a thread of its own, from when it is made until it is closed.

    :param now: the time that what is seen is noted with, in seconds
    :raise BedError: When its socket or its thread cannot be had.
    """

    def __init__(self, host: Host, address: str, now: Callable[[], float]) -> None:
        self._now = now
        self._stopping = threading.Event()
        self._changed = threading.Condition()
        self._error: OSError | None = None

        def make() -> socket.socket:
            with contextlib.ExitStack() as stack:
                made = stack.enter_context(self._socket())
                made.connect((address, ECHO_PORT))
                stack.pop_all()
                return made

        with contextlib.ExitStack() as opened:
            try:
                self._own = make() if host.namespace is None else host.namespace.call(make)
                opened.enter_context(self._own)
                self._thread = threading.Thread(target=self._guarded, name="probe", daemon=True)
                self._thread.start()
            except (OSError, RuntimeError) as error:
                why = getattr(error, "strerror", error)
                raise BedError(f"cannot reach out from {host.name} to {address}: {why}") from error
            self._opened = opened.pop_all()

    @abstractmethod
    def _socket(self) -> socket.socket: ...

    @abstractmethod
    def _run(self) -> None: ...

    @property
    @abstractmethod
    def answered(self) -> int:
        """How many answers have come so far."""

    def wait_answers(self, count: int, seconds: float) -> bool:
        """Wait until so many answers have come; whether they did in time."""
        with self._changed:
            return self._changed.wait_for(lambda: self.answered >= count, seconds)

    def close(self) -> None:
        """End it, once what is on its way has had time to come. Does nothing the second time.

        :raise BedError: When it had ended by itself.
        """
        self._stopping.set()
        self._thread.join()
        self._opened.close()
        if self._error is not None:
            raise BedError(f"a probe from the server failed: {self._error.strerror}") from self._error

    def _guarded(self) -> None:
        try:
            self._run()
        except OSError as error:
            self._error = error

    def _receive(self, until: float) -> bytes | None:
        """What comes first until then (CLOCK_MONOTONIC); None when nothing does."""
        ready, _, _ = select.select([self._own], [], [], max(0.0, until - time.monotonic()))
        if not ready:
            return None
        try:
            return self._own.recv(_DATAGRAM_BYTES, socket.MSG_DONTWAIT)
        except (BlockingIOError, ConnectionRefusedError):
            return None

    def _send(self, data: bytes) -> None:
        """Send; what the network has no route or no room for at the moment is lost, as on the way."""
        try:
            self._own.send(data)
        except (ConnectionRefusedError, BlockingIOError):
            pass
        except OSError as error:
            if error.errno not in _LOST:
                raise


class Pinger(Probe):
    """ICMP echo requests at a steady pace, whether or not they are answered.

    :ivar pings: so far; those of the last moments may yet be answered until it is closed

    :param hz: how many a second
    """

    def __init__(self, host: Host, address: str, now: Callable[[], float], hz: float = 100.0) -> None:
        self._period = 1 / hz
        self._identifier = int.from_bytes(os.urandom(2), "big")
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self.pings: list[Ping] = []
        self._answered = 0
        super().__init__(host, address, now)

    def _socket(self) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP)

    @property
    def answered(self) -> int:
        return self._answered

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stopping.is_set():
            with self._changed:
                number = len(self.pings)
                self.pings.append(Ping(number, self._now()))
            self._send(self._request(number))
            # A late one is not made up for: that would be a burst.
            due = max(due + self._period, time.monotonic())
            self._collect(due)
        late = time.monotonic() + _LATE_S
        while time.monotonic() < late and not all(ping.answers for ping in self.pings[-1:]):
            self._collect(min(late, time.monotonic() + self._period))

    def _request(self, number: int) -> bytes:
        data = _NUMBER.pack(number) + self._nonce
        head = (_ECHO_REQUEST, 0, 0, self._identifier, number & 0xFFFF)
        checksum = internet_checksum(_ICMP.pack(*head) + data)
        return _ICMP.pack(_ECHO_REQUEST, 0, checksum, *head[3:]) + data

    def _collect(self, until: float) -> None:
        while True:
            packet = self._receive(until)
            if packet is not None:
                self._take(packet)
            if time.monotonic() >= until:
                return

    def _take(self, packet: bytes) -> None:
        """A raw socket hands on the IP header as well."""
        message = packet[(packet[0] & 0xF) * 4 :] if packet else b""
        if len(message) != _ICMP.size + _NUMBER.size + _NONCE_BYTES or message[0] != _ECHO_REPLY:
            return
        if internet_checksum(message) or _ICMP.unpack_from(message)[3] != self._identifier:
            return
        number, nonce = _NUMBER.unpack_from(message, _ICMP.size)[0], message[_ICMP.size + _NUMBER.size :]
        with self._changed:
            if nonce == self._nonce and number < len(self.pings):
                ping = self.pings[number]
                if not ping.answers:
                    ping.answered = self._now()
                    self._answered += 1
                ping.answers += 1
                self._changed.notify_all()


class Session(Probe):
    """Requests to the guest's UDP echo from one socket, one after the other; each is repeated until it is answered.

    :ivar exchanges: so far; the last was perhaps not waited for

    :param period: seconds between an answer and the next request
    """

    def __init__(self, host: Host, address: str, now: Callable[[], float], period: float = 0.01) -> None:
        self._period = period
        self.exchanges: list[Exchange] = []
        super().__init__(host, address, now)

    def _socket(self) -> socket.socket:
        return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)

    @property
    def answered(self) -> int:
        return sum(exchange.answered is not None for exchange in self.exchanges)

    def _run(self) -> None:
        number = 0
        while not self._stopping.is_set():
            exchange = self._exchange(number)
            with self._changed:
                self.exchanges.append(exchange)
                self._changed.notify_all()
            number += 1
            self._stopping.wait(self._period)

    def _exchange(self, number: int) -> Exchange:
        request = _NUMBER.pack(number) + secrets.token_bytes(_NONCE_BYTES)
        sent, attempts, strange = self._now(), 0, 0
        while not self._stopping.is_set():
            self._send(request)
            attempts += 1
            until = time.monotonic() + _PATIENCE_S
            while time.monotonic() < until:
                answer = self._receive(until)
                if answer == request:
                    return Exchange(number, sent, self._now(), attempts, strange)
                # An answer to an earlier request that was repeated, or not what was sent.
                if answer is not None and (len(answer) < 4 or _NUMBER.unpack_from(answer)[0] >= number):
                    strange += 1
        return Exchange(number, sent, None, attempts, strange)


def internet_checksum(data: bytes) -> int:
    """RFC 1071; 0 over data that has its right checksum in it."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
