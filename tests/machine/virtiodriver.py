"""The driver's side of virtio devices: what a guest does, done by a test."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from sterna.hypervisor.emulated.vm import EmulatedVm
from sterna.machine.guestram import GuestRam
from sterna.machine.virtio.device import Port
from sterna.machine.virtio.mmio import Register, Status, VirtioMmio
from sterna.machine.virtio.net import VirtioNet
from sterna.memory.address import Ipa
from sterna.memory.ram import RamBlock

BASE = 0x4000_0000
RAM_BYTES = 4 << 20
MAC = bytes.fromhex("525400123456")
ENTRIES = 8
DESC, AVAIL, USED = BASE + 0x10_0000, BASE + 0x10_1000, BASE + 0x10_2000
"""Of queue 0; those of queue 1 are 0x10000 above."""
NEXT, WRITE, INDIRECT = 1, 2, 4


class SocketNetwork:
    """A network on a socket that keeps frames apart; `far` is its other end."""

    name = "socket"

    def __init__(self) -> None:
        self._near, self.far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._near.setblocking(False)
        self.far.settimeout(300)

    def fileno(self) -> int:
        return self._near.fileno()

    def receive(self) -> bytes | None:
        try:
            return self._near.recv(1 << 17)
        except BlockingIOError:
            return None

    def send(self, frame: bytes) -> bool:
        try:
            self._near.send(frame)
        except OSError:
            return False
        return True

    def close(self) -> None:
        self._near.close()
        self.far.close()


class Driver:
    """A driver of a device on a VM's memory.

    :cvar queues: how many the device has
    :cvar features: of the device's first 32, those that the driver takes
    """

    queues = 1
    features = 0
    ram: GuestRam
    offered: list[int]

    @property
    def transport(self) -> VirtioMmio:
        """The device's."""
        raise NotImplementedError

    def read(self, register: int, size: int = 4) -> int:
        return self.transport.mmio_read(register, size, 0)

    def write(self, register: int, value: int, size: int = 4) -> None:
        self.transport.mmio_write(register, size, value, 0)

    def poke(self, address: int, data: bytes) -> None:
        """As the guest writes: not the host, so no log."""
        self.ram.block.view[address - BASE : address - BASE + len(data)] = data

    def peek(self, address: int, size: int) -> bytes:
        return self.ram.read(address, size)

    def negotiate(self, low: int | None = None, high: int = 1) -> int:
        """Up to FEATURES_OK: the status that the device then has."""
        low = self.features if low is None else low
        self.write(Register.STATUS, 0)
        self.write(Register.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
        for number, word in enumerate((low, high)):
            self.write(Register.DRIVER_FEATURES_SEL, number)
            self.write(Register.DRIVER_FEATURES, word)
        self.write(Register.STATUS, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
        return self.read(Register.STATUS)

    def start(self) -> None:
        """A driver that works, its rings empty."""
        assert self.negotiate() & Status.FEATURES_OK
        for queue in range(self.queues):
            self.write(Register.QUEUE_SEL, queue)
            self.write(Register.QUEUE_NUM, ENTRIES)
            for register, address in (
                (Register.QUEUE_DESC_LOW, DESC),
                (Register.QUEUE_DRIVER_LOW, AVAIL),
                (Register.QUEUE_DEVICE_LOW, USED),
            ):
                self.write(register, address + 0x1_0000 * queue)
                self.write(register + 4, 0)
            self.poke(AVAIL + 0x1_0000 * queue, bytes(4))
            self.poke(USED + 0x1_0000 * queue, bytes(4))
            self.write(Register.QUEUE_READY, 1)
        self.offered = [0] * self.queues
        self.write(Register.STATUS, self.read(Register.STATUS) | Status.DRIVER_OK)

    def describe(
        self, queue: int, index: int, address: int, length: int, flags: int = 0, after: int = 0
    ) -> None:
        where = DESC + 0x1_0000 * queue + 16 * index
        self.poke(where, struct.pack("<QIHH", address, length, flags, after))

    def offer(self, queue: int, head: int, *, notify: bool = True) -> None:
        ring = AVAIL + 0x1_0000 * queue
        self.poke(ring + 4 + 2 * (self.offered[queue] % ENTRIES), struct.pack("<H", head))
        self.offered[queue] += 1
        self.poke(ring + 2, struct.pack("<H", self.offered[queue] & 0xFFFF))
        if notify:
            self.write(Register.QUEUE_NOTIFY, queue)

    def used(self, queue: int) -> list[tuple[int, int]]:
        """Head and bytes of each chain given back, as far as the ring still has it."""
        ring = USED + 0x1_0000 * queue
        count = int.from_bytes(self.peek(ring + 2, 2), "little")
        return [
            struct.unpack("<II", self.peek(ring + 4 + 8 * (number % ENTRIES), 8))
            for number in range(max(0, count - ENTRIES), count)
        ]


@dataclass
class Rig(Driver):
    """A network device with its driver."""

    ram: GuestRam
    port: Port
    network: SocketNetwork
    net: VirtioNet
    levels: list[bool] = field(default_factory=list)
    offered: list[int] = field(default_factory=lambda: [0, 0])

    queues = 2
    features = 1 << 5

    @property
    def transport(self) -> VirtioMmio:
        return self.net.transport


@contextmanager
def guest_ram(*, logging: bool = False) -> Iterator[GuestRam]:
    """Memory of a VM without vCPUs."""
    vm = EmulatedVm(1)
    with RamBlock("ram", RAM_BYTES) as block:
        ram = GuestRam(vm, block, Ipa(BASE))
        if logging:
            ram.start_logging()
        try:
            yield ram
        finally:
            vm.close()
            del ram


@contextmanager
def rig(*, logging: bool = False) -> Iterator[Rig]:
    """A device that runs, on memory of its own."""
    network = SocketNetwork()
    with guest_ram(logging=logging) as ram:
        levels: list[bool] = []
        port = Port(BASE, ram, levels.append)
        made = Rig(ram, port, network, VirtioNet(network, MAC, port), levels)
        try:
            made.net.resume()
            yield made
        finally:
            made.net.close()
            del made.ram
