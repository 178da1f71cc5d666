"""The memory-mapped transport of virtio devices (Virtual I/O Device Version 1.1, 4.2), version 2."""

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import IntEnum, IntFlag

from sterna.host.ratelimitedlog import RateLimitedLog
from sterna.machine.devices.irq import IrqLine
from sterna.machine.virtio.kind import Kind
from sterna.machine.virtio.queue import GuestMemory, QueueError, QueueState, Virtqueue

log = logging.getLogger(__name__)

MAGIC = 0x74726976
VERSION = 2
VENDOR = 0x554D4551
"""What QEMU's boards of the same names say."""
VERSION_1 = 1 << 32
"""VIRTIO_F_VERSION_1: the one feature that every driver of this transport must take (6.1)."""
_U32 = 0xFFFF_FFFF
_CONFIG = 0x100


class Register(IntEnum):
    """Register offsets (4.2.2)."""

    MAGIC = 0x000
    VERSION = 0x004
    DEVICE_ID = 0x008
    VENDOR_ID = 0x00C
    DEVICE_FEATURES = 0x010
    DEVICE_FEATURES_SEL = 0x014
    DRIVER_FEATURES = 0x020
    DRIVER_FEATURES_SEL = 0x024
    QUEUE_SEL = 0x030
    QUEUE_NUM_MAX = 0x034
    QUEUE_NUM = 0x038
    QUEUE_READY = 0x044
    QUEUE_NOTIFY = 0x050
    INTERRUPT_STATUS = 0x060
    INTERRUPT_ACK = 0x064
    STATUS = 0x070
    QUEUE_DESC_LOW = 0x080
    QUEUE_DESC_HIGH = 0x084
    QUEUE_DRIVER_LOW = 0x090
    QUEUE_DRIVER_HIGH = 0x094
    QUEUE_DEVICE_LOW = 0x0A0
    QUEUE_DEVICE_HIGH = 0x0A4
    CONFIG_GENERATION = 0x0FC


_ADDRESSES = {
    Register.QUEUE_DESC_LOW: ("desc", 0),
    Register.QUEUE_DESC_HIGH: ("desc", 32),
    Register.QUEUE_DRIVER_LOW: ("avail", 0),
    Register.QUEUE_DRIVER_HIGH: ("avail", 32),
    Register.QUEUE_DEVICE_LOW: ("used", 0),
    Register.QUEUE_DEVICE_HIGH: ("used", 32),
}
"""Field of a queue and first bit of it that a register sets."""


class Status(IntFlag):
    """Device status (2.1)."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class Interrupt(IntFlag):
    """Interrupt status (4.2.2)."""

    USED_BUFFER = 1
    CONFIG = 2


@dataclass
class TransportState:
    """All that a driver has done to a transport; what migrates.

    :ivar driver_features: what the driver took
    """

    status: int = 0
    interrupt_status: int = 0
    device_features_sel: int = 0
    driver_features_sel: int = 0
    queue_sel: int = 0
    driver_features: int = 0
    queues: list[QueueState] = field(default_factory=list)


class VirtioMmio:
    """A transport and its queues.

    :ivar lock: held by whoever touches state or queues. Guest accesses wait for it, so its holder must not wait for a vCPU
    :ivar queues: the device's

    :param kind: of the device behind it
    :param config: gives the device's configuration space
    :param notify: the driver has set its status, offered buffers, or reset the device. Must not wait
    """

    def __init__(
        self,
        kind: Kind,
        memory: GuestMemory,
        irq: IrqLine,
        config: Callable[[], bytes],
        notify: Callable[[], None],
    ) -> None:
        self.lock = threading.RLock()
        self.queues = [Virtqueue(limit, memory) for limit in kind.queue_limits]
        self._device_id = kind.device_id
        self._offered = kind.features | VERSION_1
        self._config = config
        self._notify = notify
        self._irq = irq
        self._state = TransportState()
        self._rate_limited = RateLimitedLog(log.warning)

    # -- for the device ----------------------------------------------------------------------------------------------------

    @property
    def driver_ok(self) -> bool:
        """Whether the driver works with the device, and nothing has gone wrong."""
        return self._state.status & (Status.DRIVER_OK | Status.NEEDS_RESET) == Status.DRIVER_OK

    def interrupt(self, cause: Interrupt = Interrupt.USED_BUFFER) -> None:
        """Raise the interrupt."""
        self._state.interrupt_status |= cause
        self._update()

    def fail(self, error: QueueError) -> None:
        """The driver is wrong: nothing more is done for it until it resets the device (2.1.2)."""
        self._rate_limited.tell(f"virtio device {self._device_id}: {error}; it waits for a reset")
        self._state.status |= Status.NEEDS_RESET
        if self._state.status & Status.DRIVER_OK:
            self.interrupt(Interrupt.CONFIG)

    # -- state -------------------------------------------------------------------------------------------------------------

    def save(self) -> TransportState:
        """A copy of the state."""
        with self.lock:
            return replace(self._state, queues=[replace(queue.state) for queue in self.queues])

    def check(self, state: TransportState) -> None:
        """Whether a state can be gone on from.

        :raise QueueError: When it cannot.
        """
        unknown = state.driver_features & ~self._offered
        if unknown:
            bits = ", ".join(str(bit) for bit in range(64) if unknown >> bit & 1)
            raise QueueError(f"the guest uses features that this device has not: bits {bits}")
        for index, (queue, saved) in enumerate(zip(self.queues, state.queues, strict=True)):
            try:
                queue.check(saved)
            except QueueError as error:
                raise QueueError(f"queue {index}: {error}") from error

    def load(self, state: TransportState) -> None:
        """Go on from a state that `check` has passed."""
        with self.lock:
            for queue, saved in zip(self.queues, state.queues, strict=True):
                queue.state = replace(saved)
            self._state = replace(state, queues=[])
            self._update()

    # -- the guest's accesses ----------------------------------------------------------------------------------------------

    def mmio_read(self, offset: int, size: int, cpu: int) -> int:
        """A register, or bytes of the configuration space."""
        with self.lock:
            if offset >= _CONFIG:
                at = offset - _CONFIG
                return int.from_bytes(self._config()[at : at + size], "little")
            if offset & 3 or size != 4:
                return 0
            return self._read(offset)

    def mmio_write(self, offset: int, size: int, value: int, cpu: int) -> None:
        """Set a register. The configuration space is read-only; nothing happens where there is no register."""
        with self.lock:
            if offset < _CONFIG and not offset & 3 and size == 4:
                self._write(offset, value & _U32)

    def _read(self, offset: int) -> int:
        state = self._state
        queue = self._selected()
        match offset:
            case Register.MAGIC:
                return MAGIC
            case Register.VERSION:
                return VERSION
            case Register.DEVICE_ID:
                return self._device_id
            case Register.VENDOR_ID:
                return VENDOR
            case Register.DEVICE_FEATURES:
                return _word(self._offered, state.device_features_sel)
            case Register.QUEUE_NUM_MAX:
                return queue.state.limit if queue is not None else 0
            case Register.QUEUE_READY:
                return int(queue is not None and queue.state.ready)
            case Register.INTERRUPT_STATUS:
                return state.interrupt_status
            case Register.STATUS:
                return state.status
        return 0

    def _write(self, offset: int, value: int) -> None:
        state = self._state
        match offset:
            case Register.DEVICE_FEATURES_SEL:
                state.device_features_sel = value
            case Register.DRIVER_FEATURES_SEL:
                state.driver_features_sel = value
            case Register.DRIVER_FEATURES:
                self._take_features(value)
            case Register.QUEUE_SEL:
                state.queue_sel = value
            case Register.QUEUE_NOTIFY:
                self._notify()
            case Register.INTERRUPT_ACK:
                state.interrupt_status &= ~value
                self._update()
            case Register.STATUS:
                self._set_status(value & 0xFF)
            case _:
                self._set_queue(offset, value)

    def _take_features(self, value: int) -> None:
        """Features are settled once FEATURES_OK is set (3.1.1)."""
        state = self._state
        if state.status & Status.FEATURES_OK or state.driver_features_sel > 1:
            return
        shift = 32 * state.driver_features_sel
        state.driver_features = state.driver_features & ~(_U32 << shift) | value << shift

    def _set_status(self, value: int) -> None:
        state = self._state
        if value == 0:
            self._state = TransportState()
            for queue in self.queues:
                queue.reset()
            self._update()
        else:
            wanted = state.driver_features
            acceptable = not wanted & ~self._offered and wanted & VERSION_1
            if not state.status & Status.FEATURES_OK and not acceptable:
                value &= ~Status.FEATURES_OK
            state.status = value | state.status & Status.NEEDS_RESET
        self._notify()

    def _set_queue(self, offset: int, value: int) -> None:
        queue = self._selected()
        if queue is None:
            return
        chosen = queue.state
        if offset == Register.QUEUE_READY:
            # A driver that takes a queue back (2.1: by reset only) finds it as it left it.
            usable = 0 < chosen.num <= chosen.limit and not chosen.num & chosen.num - 1
            chosen.ready = bool(value & 1) and usable
            self._notify()
        elif chosen.ready:
            return  # it is in use
        elif offset == Register.QUEUE_NUM:
            chosen.num = value & 0xFFFF
        elif offset in _ADDRESSES:
            name, shift = _ADDRESSES[Register(offset)]
            setattr(chosen, name, getattr(chosen, name) & ~(_U32 << shift) | value << shift)

    def _selected(self) -> Virtqueue | None:
        number = self._state.queue_sel
        return self.queues[number] if number < len(self.queues) else None

    def _update(self) -> None:
        self._irq(self._state.interrupt_status != 0)


WITHOUT_DEVICE: Mapping[int, int] = {
    Register.MAGIC: MAGIC,
    Register.VERSION: VERSION,
    Register.VENDOR_ID: VENDOR,
}
"""Registers of a transport with nothing behind it; the others are 0, DeviceID too (4.2.2)."""


def _word(value: int, number: int) -> int:
    """The 32 bits that a selector chooses; 0 beyond those that there are."""
    return value >> 32 * number & _U32 if number < 2 else 0
