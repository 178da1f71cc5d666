"""A machine's network cards: made, run, and migrated together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from sterna.machine.board import Board
from sterna.machine.devices.device import Apply, Device, Region, SectionKey, Stopped, key_text
from sterna.machine.devices.irq import IrqLine
from sterna.machine.guestram import GuestRam
from sterna.machine.nicconfig import NicConfig
from sterna.machine.tap import Tap
from sterna.machine.virtio.mmio import TransportBank
from sterna.machine.virtio.net import FrameCounts, VirtioNet
from sterna.machine.virtio.queue import QueueError
from sterna.machine.virtio.section import VIRTIO_NET, load_net, save_net, section_name
from sterna.memory.address import PAGE_SIZE
from sterna.stream.vmstate import DeviceState, StreamError


class Nics(Device):
    """The cards of one machine, and the board's row of transports that they are behind.

    :param line: gives the interrupt line of a number
    :raise TapError: When a tap cannot be opened.
    """

    chosen = True

    def __init__(
        self,
        configs: Sequence[NicConfig],
        board: Board,
        ram: GuestRam,
        line: Callable[[int], IrqLine],
        stack: ExitStack,
    ) -> None:
        slots = board.virtio
        self._names: list[str] = []
        self._taps: list[Tap] = []
        self._devices: list[VirtioNet] = []
        transports = {}
        for number, config in enumerate(configs):
            slot = slots.slot_of(number)
            tap = Tap.open(config.ifname) if config.fd is None else Tap.adopt(config.fd)
            stack.callback(tap.close)
            assert config.mac is not None
            device = VirtioNet(tap, config.mac, ram, line(slots.irq(slot)))
            stack.callback(device.close)
            self._names.append(section_name(slots.address(slot)))
            self._taps.append(tap)
            self._devices.append(device)
            transports[slot] = device.transport
        self.descriptions = dict.fromkeys(self._names, VIRTIO_NET)
        size = slots.address(slots.count) - slots.base
        size = -(-size // PAGE_SIZE) * PAGE_SIZE
        self.regions = (Region(slots.base, size, TransportBank(transports)),)

    def counts(self) -> dict[str, FrameCounts]:
        """What each card has carried, by its tap."""
        return {tap.name: device.counts for tap, device in zip(self._taps, self._devices, strict=True)}

    def resume(self) -> None:
        """Let frames go."""
        for device in self._devices:
            device.resume()

    def pause(self) -> None:
        """No frame moves, and no card touches guest RAM, once this returns."""
        for device in self._devices:
            device.pause()

    def announce(self, delays: Sequence[float]) -> None:
        """Tell the networks that the guest is here, once it runs. As `VirtioNet.announce`."""
        for device in self._devices:
            device.announce(delays)

    def save(self, stopped: Stopped) -> Sequence[DeviceState]:
        """The cards' sections. They are paused."""
        return [
            save_net(name, device.transport.save(), device.mac)
            for name, device in zip(self._names, self._devices, strict=True)
        ]

    def missing(self, key: SectionKey) -> StreamError:
        """Says which card it is of."""
        tap = self._taps[self._names.index(key[0])].name
        return StreamError(
            f"the section is missing; this machine has a network card there (--nic, tap {tap})", key[0]
        )

    def surplus(self, key: SectionKey) -> StreamError:
        """A transport has one device."""
        return StreamError("the section comes twice", key_text(key))

    def load(self, found: Mapping[SectionKey, DeviceState], stopped: Stopped) -> Apply:
        """Check the cards' sections against guest RAM, which has arrived."""
        loads = []
        for name, device in zip(self._names, self._devices, strict=True):
            transport, mac = load_net(found[name, 0])
            try:
                device.transport.check(transport)
            except QueueError as error:
                raise StreamError(str(error), name) from error
            loads.append((device, transport, mac))

        def apply() -> None:
            for device, transport, mac in loads:
                device.mac = mac
                device.transport.load(transport)

        return apply
