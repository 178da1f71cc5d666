"""A virtio network device (Virtual I/O Device Version 1.1, 5.1) between a guest and a network of the host's.

A thread of its own carries the frames. It holds the device's lock for one frame at a time, so that neither a guest that offers
buffers without end nor one that offers none holds anybody up. Frames that the guest has no buffer for wait in the network.
"""

import logging
import os
import select
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any, Protocol

from sterna.machine.devices.device import Apply
from sterna.machine.nicconfig import NicConfig
from sterna.machine.tap import Tap
from sterna.machine.virtio.device import Port, VirtioDevice
from sterna.machine.virtio.kind import Kind
from sterna.machine.virtio.queue import QueueError
from sterna.stream.vmstate import buffer, counted_array, u8, u16, u32

log = logging.getLogger(__name__)

F_MAC = 1 << 5
F_STATUS = 1 << 16
FEATURES = F_MAC | F_STATUS
"""What the device offers besides VERSION_1 (5.1.3)."""
QUEUE_LIMIT = 256
LINK_UP = 1
MAX_FRAME_BYTES = 65_550
"""An IP packet of 64 KiB and its Ethernet header."""
MIN_FRAME_BYTES = 14
_HEADER = bytes(10) + (1).to_bytes(2, "little")
"""struct virtio_net_hdr: no offloads; the frame is in one buffer (5.1.6.4.1)."""
_RARP = 0x8035
_RARP_REQUEST_REVERSE = 3
_SMALLEST_FRAME = 60
_CONTROL_QUEUE_LIMIT = 64
_MAC_BYTES = 6
_VLAN_FILTER_BYTES = 512
_MAC_FILTER_LIMIT = 64
_SWITCHES = ("multi_overflow", "uni_overflow", "alluni", "nomulti", "nouni", "nobcast", "has_ufo")
"""Fields that a driver sets through the control queue, and so never here."""


class Queue(IntEnum):
    """The device's queues, named as the driver sees them (5.1.2)."""

    RECEIVE = 0
    TRANSMIT = 1


class Network(Protocol):
    """The host's side: an Ethernet. Frames have no checksum at their end.

    :ivar name: what people call it
    """

    name: str

    def fileno(self) -> int:
        """A descriptor that polls as readable when there is a frame."""
        ...

    def receive(self) -> bytes | None:
        """The next frame, or None when there is none.

        :raise OSError: When there will be no more.
        """
        ...

    def send(self, frame: bytes) -> bool:
        """Send a frame, or drop it: whether it went. Never waits."""
        ...

    def close(self) -> None:
        """Leave it."""
        ...


@dataclass(frozen=True)
class FrameCounts:
    """Frames since the device was made.

    :ivar received: given to the guest
    :ivar sent: by the guest, that the network took
    :ivar dropped: either way: too large for the guest's buffer, or not taken by the network
    :ivar announced: sent in the guest's name
    """

    received: int = 0
    sent: int = 0
    dropped: int = 0
    announced: int = 0


class VirtioNet(VirtioDevice):
    """The device. Frames go only while it runs: see `resume` and `pause`.

    :ivar network: the host's side; closed with the device, or when that cannot be made
    :ivar mac: the guest's address, 6 bytes
    :ivar counts: what has happened

    :raise RuntimeError: When the host has no thread to spare.
    """

    kind = Kind(
        name="virtio-net",
        device_id=1,
        queue_limits=(QUEUE_LIMIT, QUEUE_LIMIT),
        features=FEATURES,
        version=11,
        fields=(
            buffer("mac", _MAC_BYTES),
            u32("tx_waiting"),
            u32("mergeable_rx_bufs"),
            u16("link_status"),
            u8("promisc"),
            u8("allmulti"),
            u32("mac_filters"),
            counted_array(
                buffer("mac_filter", _MAC_BYTES), counted_by="mac_filters", limit=_MAC_FILTER_LIMIT
            ),
            buffer("vlan_filter", _VLAN_FILTER_BYTES),
            u32("has_vnet_hdr"),
            *(u8(name) for name in _SWITCHES),
        ),
        # QEMU's device has a control queue, also when it does not offer it.
        hidden_queues=(_CONTROL_QUEUE_LIMIT,),
    )

    def __init__(self, network: Network, mac: bytes, port: Port) -> None:
        super().__init__(port)
        self.mac = mac
        self.counts = FrameCounts()
        self.network = network
        self._running = False
        self._closed = False
        self._connected = True
        self._announcements: list[float] = []
        self._last_announcement = 0.0
        with ExitStack() as opened:
            opened.callback(network.close)
            self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
            opened.callback(os.close, self._wake)
            self._thread = threading.Thread(target=self._serve, name="virtio-net", daemon=True)
            self._thread.start()
            self._opened = opened.pop_all()

    # -- for the machine ---------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Let frames go, both ways."""
        with self.transport.lock:
            self._running = True
        self.notify()

    def pause(self) -> None:
        """Let none go any more; once this returns the device does not touch guest RAM."""
        with self.transport.lock:
            self._running = False

    def announce(self, delays: Sequence[float]) -> None:
        """Tell the network where the guest is now, as soon as it runs: reverse ARP requests from its address, which switches
        learn from.

        :param delays: seconds before each
        """
        with self.transport.lock:
            self._announcements = list(delays)
            self._last_announcement = time.monotonic()
        self.notify()

    def close(self) -> None:
        """End the thread, and leave the network."""
        with self.transport.lock:
            self._closed = True
        self.notify()
        self._thread.join()
        self._opened.close()

    @property
    def asked_for(self) -> tuple[str, str]:
        """The card by its tap."""
        return "a network card", f"--nic, tap {self.network.name}"

    def save_own(self) -> dict[str, Any]:
        """What the section has of a card."""
        return card_fields(self.mac)

    def load_own(self, fields: Mapping[str, Any]) -> Apply:
        """Its address comes with the guest."""

        def apply() -> None:
            self.mac = bytes(fields["mac"])

        return apply

    # -- for the transport -------------------------------------------------------------------------------------------------

    def config(self) -> bytes:
        """Address and link status (5.1.4)."""
        return card_config(self.mac)

    def notify(self) -> None:
        """Have the thread look."""
        os.eventfd_write(self._wake, 1)

    # -- the thread --------------------------------------------------------------------------------------------------------

    def _serve(self) -> None:
        while not self._closed:
            with self.transport.lock:
                wants_frames = self._can_receive()
                timeout = self._until_announcement()
            waiting = select.poll()
            waiting.register(self._wake, select.POLLIN)
            if wants_frames:
                waiting.register(self.network.fileno(), select.POLLIN)
            waiting.poll(timeout)
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                pass
            while self.work():
                pass

    def work(self) -> bool:
        """Carry one frame each way, if there are any and the guest runs: whether there were."""
        with self.transport.lock:
            if not self._running or self._closed:
                return False
            self._announce()
            try:
                sent = self._transmit()
                return self._receive() or sent
            except QueueError as error:
                self.transport.fail(error)
                return False

    def _can_receive(self) -> bool:
        if not (self._running and self._connected and self.transport.driver_ok):
            return False
        try:
            return self.transport.queues[Queue.RECEIVE].waiting() > 0
        except QueueError as error:
            self.transport.fail(error)
            return False

    def _receive(self) -> bool:
        if not self._can_receive():
            return False
        queue = self.transport.queues[Queue.RECEIVE]
        chain = queue.peek()
        if chain is None or not chain.writable:
            raise QueueError("a buffer to receive into has no descriptor to be written")
        try:
            frame = self.network.receive()
        except OSError as error:
            log.warning("the network of a virtio device is gone: %s", error.strerror or error)
            self._connected = False
            return False
        if frame is None:
            return False
        data = _HEADER + frame
        if len(data) > chain.writable_bytes:
            self._count(dropped=1)
            return True
        queue.scatter(chain, data)
        queue.advance()
        wanted = queue.push(chain.head, len(data))
        self._count(received=1)
        if wanted:
            self.transport.interrupt()
        return True

    def _transmit(self) -> bool:
        if not self.transport.driver_ok:
            return False
        queue = self.transport.queues[Queue.TRANSMIT]
        chain = queue.peek()
        if chain is None:
            return False
        size = chain.readable_bytes - len(_HEADER)
        if size < 0:
            raise QueueError(f"a frame of {chain.readable_bytes} bytes has no room for its header")
        sent = False
        if MIN_FRAME_BYTES <= size <= MAX_FRAME_BYTES:
            sent = self.network.send(queue.gather(chain)[len(_HEADER) :])
        self._count(sent=int(sent), dropped=int(not sent))
        queue.advance()
        if queue.push(chain.head, 0):
            self.transport.interrupt()
        return True

    def _until_announcement(self) -> float | None:
        """Milliseconds; None when there is none to come."""
        if not self._announcements or not self._running:
            return None
        return max(0.0, self._last_announcement + self._announcements[0] - time.monotonic()) * 1000

    def _announce(self) -> None:
        if self._until_announcement() == 0.0:
            del self._announcements[0]
            self._last_announcement = time.monotonic()
            self._count(announced=int(self.network.send(announcement(self.mac))))

    def _count(self, **more: int) -> None:
        changes = {name: getattr(self.counts, name) + count for name, count in more.items()}
        self.counts = replace(self.counts, **changes)


def on_tap(config: NicConfig) -> Callable[[Port], VirtioNet]:
    """What makes a card on a tap. It raises `TapError` when the tap cannot be opened."""

    def make(port: Port) -> VirtioNet:
        assert config.mac is not None
        tap = Tap.open(config.ifname) if config.fd is None else Tap.adopt(config.fd)
        return VirtioNet(tap, config.mac, port)

    return make


def card_config(mac: bytes) -> bytes:
    """The configuration space of a card that has this address."""
    return mac + LINK_UP.to_bytes(2, "little")


def card_fields(mac: bytes) -> dict[str, Any]:
    """A card's own fields of its section."""
    return {
        "mac": mac,
        "tx_waiting": 0,
        "mergeable_rx_bufs": 0,
        "link_status": LINK_UP,
        # Without a control queue the driver cannot ask for a filter: everything comes.
        "promisc": 1,
        "allmulti": 0,
        "mac_filters": 0,
        "mac_filter": [],
        "vlan_filter": b"\xff" * _VLAN_FILTER_BYTES,
        "has_vnet_hdr": 0,
        **dict.fromkeys(_SWITCHES, 0),
    }


def announcement(mac: bytes) -> bytes:
    """A reverse ARP request to everybody for `mac`, from it (RFC 903)."""
    request = b"".join(number.to_bytes(2, "big") for number in (1, 0x0800, 0x0604, _RARP_REQUEST_REVERSE))
    frame = b"\xff" * 6 + mac + _RARP.to_bytes(2, "big") + request + mac + bytes(4) + mac + bytes(4)
    return frame.ljust(_SMALLEST_FRAME, b"\0")
