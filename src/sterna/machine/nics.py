"""A machine's network cards: made, run, and migrated together."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

from sterna.hypervisor.interface import Vm
from sterna.machine.board import Board
from sterna.machine.devices.irq import IrqLine
from sterna.machine.guestram import GuestRam
from sterna.machine.nicconfig import NicConfig
from sterna.machine.tap import Tap
from sterna.machine.virtio.mmio import TransportBank
from sterna.machine.virtio.net import FrameCounts, VirtioNet
from sterna.machine.virtio.queue import QueueError
from sterna.machine.virtio.section import VIRTIO_NET, load_net, save_net, section_name
from sterna.memory.address import PAGE_SIZE
from sterna.stream.vmstate import DeviceState, StreamError, VmStateDescription


class Nics:
    """The cards of one machine, and the board's row of transports that they are behind.

    :ivar descriptions: how each card's section is laid out, by the section's name

    :param line: gives the interrupt line of a number
    :raise TapError: When a tap cannot be opened.
    """

    def __init__(
        self,
        configs: Sequence[NicConfig],
        board: Board,
        vm: Vm,
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
        self.descriptions: Mapping[str, VmStateDescription] = dict.fromkeys(self._names, VIRTIO_NET)
        size = slots.address(slots.count) - slots.base
        vm.add_mmio(slots.base, -(-size // PAGE_SIZE) * PAGE_SIZE, TransportBank(transports))

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

    def save(self) -> list[DeviceState]:
        """The cards' sections. They are paused."""
        return [
            save_net(name, device.transport.save(), device.mac)
            for name, device in zip(self._names, self._devices, strict=True)
        ]

    def load(self, states: Sequence[DeviceState]) -> tuple[list[DeviceState], Callable[[], None]]:
        """Check the cards' sections against guest RAM, which has arrived. Nothing is applied.

        :return: the other sections, and what puts these into the cards
        :raise StreamError: When one is missing, comes twice, or is of a card that cannot be.
        """
        own: dict[str, DeviceState] = {}
        others = []
        for state in states:
            if state.name not in self.descriptions:
                others.append(state)
            elif state.name in own or state.instance_id:
                raise StreamError("the section comes twice", f"{state.name} {state.instance_id}")
            else:
                own[state.name] = state
        loads = []
        for name, tap, device in zip(self._names, self._taps, self._devices, strict=True):
            if name not in own:
                raise StreamError(
                    f"the section is missing; this machine has a network card there (--nic, tap {tap.name})",
                    name,
                )
            transport, mac = load_net(own[name])
            try:
                device.transport.check(transport)
            except QueueError as error:
                raise StreamError(str(error), name) from error
            loads.append((device, transport, mac))

        def apply() -> None:
            for device, transport, mac in loads:
                device.mac = mac
                device.transport.load(transport)

        return others, apply
