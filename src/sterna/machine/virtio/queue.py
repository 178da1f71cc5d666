"""The device's side of a split virtqueue (Virtual I/O Device Version 1.1, 2.6).

The driver's rings and descriptors are in guest RAM and may hold anything. Whatever they hold costs bounded work here, and
an address that is not RAM, a chain that does not end or an index that cannot be is a `QueueError`.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sterna.machine.errors import MachineError
from sterna.machine.guestram import AddressError

_DESCRIPTOR = struct.Struct("<QIHH")
_USED_ELEMENT = struct.Struct("<II")
_NEXT, _WRITE, _INDIRECT = 1, 2, 4
_NO_INTERRUPT = 1
_INDEX = 2
"""Offset of a ring's index: flags before it, elements after."""
_RING = 4
_MASK = 0xFFFF


class QueueError(MachineError):
    """The driver broke the rules of a virtqueue; the text says which. The device needs a reset."""


class GuestMemory(Protocol):
    """Guest RAM as a device sees it."""

    def read(self, ipa: int, size: int) -> bytes:
        """
        :raise AddressError: When the range is not within RAM.
        """
        ...

    def write(self, ipa: int, data: bytes | memoryview) -> None:
        """Through the dirty log.

        :raise AddressError: When the range is not within RAM.
        """
        ...


@dataclass
class QueueState:
    """What a queue is; what migrates of it.

    :ivar limit: the most entries it can have
    :ivar num: entries that the driver gave it, a power of two; 0: none yet
    :ivar ready: the driver has set it up
    :ivar desc: guest physical address of the descriptor table; likewise `avail` and `used` of the rings
    :ivar last_avail: index in the available ring that is looked at next, modulo 65536
    :ivar used_index: index in the used ring that is written next, modulo 65536
    """

    limit: int
    num: int = 0
    ready: bool = False
    desc: int = 0
    avail: int = 0
    used: int = 0
    last_avail: int = 0
    used_index: int = 0


@dataclass(frozen=True)
class Chain:
    """Buffers that the driver offers as one.

    :ivar head: index of the first descriptor
    :ivar readable: address and length of each buffer that the device reads
    :ivar writable: and of each that it writes
    """

    head: int
    readable: Sequence[tuple[int, int]]
    writable: Sequence[tuple[int, int]]

    @property
    def readable_bytes(self) -> int:
        return sum(length for _, length in self.readable)

    @property
    def writable_bytes(self) -> int:
        return sum(length for _, length in self.writable)


class Virtqueue:
    """One queue. No lock of its own.

    :ivar state: replace it to load a state
    """

    def __init__(self, limit: int, memory: GuestMemory) -> None:
        self.state = QueueState(limit)
        self._memory = memory

    def reset(self) -> None:
        """As after power-on."""
        self.state = QueueState(self.state.limit)

    def waiting(self) -> int:
        """How many chains the driver has made available.

        :raise QueueError: When that cannot be.
        """
        state = self.state
        if not state.ready:
            return 0
        count = self._u16(state.avail + _INDEX, "the available ring") - state.last_avail & _MASK
        if count > state.num:
            raise QueueError(f"the available ring of {state.num} entries offers {count}")
        return count

    def peek(self) -> Chain | None:
        """The next chain, which stays the next until `advance`.

        :raise QueueError: When the rings or descriptors are wrong.
        """
        if not self.waiting():
            return None
        state = self.state
        at = state.avail + _RING + 2 * (state.last_avail % state.num)
        return self._chain(self._u16(at, "the available ring"))

    def advance(self) -> None:
        """Take the chain that `peek` gave."""
        self.state.last_avail = self.state.last_avail + 1 & _MASK

    def push(self, head: int, written: int) -> bool:
        """Give a chain back, with so many bytes written to it.

        :return: whether the driver wants an interrupt for it
        :raise QueueError: When a ring is not in RAM.
        """
        state = self.state
        at = state.used + _RING + 8 * (state.used_index % state.num)
        self._write(at, _USED_ELEMENT.pack(head, written), "the used ring")
        state.used_index = state.used_index + 1 & _MASK
        # The index last: from then on the driver looks at the element.
        self._write(state.used + _INDEX, state.used_index.to_bytes(2, "little"), "the used ring")
        return not self._u16(state.avail, "the available ring") & _NO_INTERRUPT

    def check(self, state: QueueState) -> None:
        """Whether a state can be gone on from with RAM as it is; takes `used_index` from RAM.

        :raise QueueError: When it cannot.
        """
        if not state.ready:
            return
        if state.num > state.limit or state.num & state.num - 1:
            raise QueueError(f"{state.num} entries are no power of two up to {state.limit}")
        if not state.num:
            raise QueueError("it is ready without entries")
        state.used_index = self._u16(state.used + _INDEX, "the used ring")
        if state.last_avail - state.used_index & _MASK > state.num:
            raise QueueError(
                f"{state.last_avail} chains taken and {state.used_index} given back cannot be with {state.num} entries"
            )

    def _chain(self, head: int) -> Chain:
        num = self.state.num
        readable: list[tuple[int, int]] = []
        writable: list[tuple[int, int]] = []
        index = head
        for _ in range(num):
            if index >= num:
                raise QueueError(f"descriptor {index} is not one of {num}")
            where = self.state.desc + _DESCRIPTOR.size * index
            raw = self._read(where, _DESCRIPTOR.size, "the descriptor table")
            address, length, flags, following = _DESCRIPTOR.unpack(raw)
            if flags & _INDIRECT:
                raise QueueError(
                    f"descriptor {index} is a table of others, which the device has not offered to take"
                )
            if flags & _WRITE:
                writable.append((address, length))
            elif writable:
                raise QueueError(f"descriptor {index} is to be read and follows one to be written")
            else:
                readable.append((address, length))
            if not flags & _NEXT:
                return Chain(head, readable, writable)
            index = following
        raise QueueError(f"the chain from descriptor {head} does not end")

    def _u16(self, at: int, what: str) -> int:
        return int.from_bytes(self._read(at, 2, what), "little")

    def _read(self, at: int, size: int, what: str) -> bytes:
        try:
            return self._memory.read(at, size)
        except AddressError as error:
            raise QueueError(f"{what}: {error}") from error

    def _write(self, at: int, data: bytes, what: str) -> None:
        try:
            self._memory.write(at, data)
        except AddressError as error:
            raise QueueError(f"{what}: {error}") from error

    def gather(self, chain: Chain) -> bytes:
        """The bytes of a chain's readable buffers. The caller has looked how many there are.

        :raise QueueError: When they are not in RAM.
        """
        return b"".join(self._read(address, length, "a buffer") for address, length in chain.readable)

    def scatter(self, chain: Chain, data: bytes) -> None:
        """Fill a chain's writable buffers, which have room for it.

        :raise QueueError: When they are not in RAM.
        """
        at = 0
        for address, length in chain.writable:
            part = data[at : at + length]
            self._write(address, part, "a buffer")
            at += len(part)
