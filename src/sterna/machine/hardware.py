"""What a machine consists of: its VM, RAM, vCPUs and devices, made as a whole or not at all."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, TypeVar

from sterna.hypervisor.accelerator import check_arch, open_vm
from sterna.hypervisor.interface import DirtyLogMode
from sterna.machine import devicetree, kernel
from sterna.machine.clock import Clock
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.cpus import CpuThreads
from sterna.machine.devices.device import Device
from sterna.machine.devices.pl011 import Pl011
from sterna.machine.globalstate import GlobalState
from sterna.machine.guestram import GuestRam
from sterna.machine.loader import Image, place
from sterna.machine.platform import platform_of
from sterna.machine.serial import NullSerial, SerialBackend, open_serial
from sterna.machine.throttle import Throttle
from sterna.machine.virtio.bus import VirtioBus
from sterna.machine.virtio.catalog import DEVICES
from sterna.machine.virtio.net import on_tap
from sterna.memory.ram import RamBlock, RamError

DeviceT = TypeVar("DeviceT", bound=Device)


class Hardware:
    """The parts of one machine, which stand still.

    :ivar serial: the far end of the first UART
    :ivar vm: the hypervisor's part
    :ivar ram: guest RAM
    :ivar platform: the CPUs
    :ivar devices: all that is saved of it but its RAM, in the order of the stream
    :ivar cards: network cards
    :ivar threads: run the vCPUs
    :ivar throttle: slows them down

    :param prepare: called before the first thing is made that needs the hypervisor
    :param vcpu_left: called on a vCPU's thread when that vCPU has stopped by itself
    :raise Exception: As `Machine`.
    """

    def __init__(
        self, config: MachineConfig, prepare: Callable[[], None], vcpu_left: Callable[[], None]
    ) -> None:
        with ExitStack() as stack:
            boot = self._find_kernel(config)
            self._make_vm(config, prepare, stack)
            self._make_devices(config, stack)
            if boot is not None:
                self._load(config, *boot)
            self.threads = CpuThreads(self.platform.vcpus, vcpu_left)
            stack.callback(self.threads.close)
            self.throttle = Throttle(self.threads)
            stack.callback(self.throttle.set, 0)
            # Last: it empties a file, which a machine that cannot be made must not do.
            self.serial.start(self._console.receive)
            self._resources = stack.pop_all()

    @staticmethod
    def _find_kernel(config: MachineConfig) -> tuple[Image, bytes] | None:
        check_arch(config.accel, config.board.arch)
        if config.kernel is None or config.incoming:
            return None
        device_tree = devicetree.build(config)
        return kernel.find(config, config.board.reserved_bytes(len(device_tree))), device_tree

    def _make_vm(self, config: MachineConfig, prepare: Callable[[], None], stack: ExitStack) -> None:
        board = config.board
        try:
            ram = RamBlock(board.ram_name, config.memory_bytes, populated=config.preallocated)
            block = stack.enter_context(ram)
        except RamError as error:
            raise ConfigError(f"memory: {error}") from error
        with ExitStack() as line:
            self.serial: SerialBackend = open_serial(config.serial)
            line.callback(self.serial.close)
            prepare()
            self.vm = open_vm(
                config.accel,
                board.arch,
                vcpus=config.smp,
                dirty_log=DirtyLogMode(config.dirty_log),
                secondaries_off=board.secondaries_off,
            )
            stack.callback(self.vm.close)
            unit = 1 << self.vm.log_page_bits
            if config.memory_bytes % unit:
                raise ConfigError(
                    f"memory: {config.memory_bytes} bytes is not a multiple of {unit} bytes, a page of the dirty log here"
                )
            # Opened before the VM, and closed before it too: input raises an interrupt at a vCPU.
            stack.enter_context(line.pop_all())
        self.ram = GuestRam(
            self.vm, block, board.ram_base, initially_set=config.dirty_log == DirtyLogMode.MANUAL
        )

    def _make_devices(self, config: MachineConfig, stack: ExitStack) -> None:
        board = config.board
        # Those of the board's architecture, which the platform is of as well.
        vcpus: list[Any] = [self.vm.create_vcpu(index) for index in range(config.smp)]
        self.platform = platform_of(board)(board, vcpus)
        lines = [self.serial, *(NullSerial() for _ in board.uarts[1:])]
        uarts = [
            Pl011(slot, line, self.platform.line(slot.irq), number)
            for number, (slot, line) in enumerate(zip(board.uarts, lines, strict=True))
        ]
        self._console = uarts[0]
        bus = VirtioBus(board.virtio, self.ram, self.platform.line)
        self.devices: list[Device] = []

        def keep(device: DeviceT) -> DeviceT:
            self.devices.append(device)
            stack.callback(device.close)
            return device

        for device in (
            Clock(self.vm.counter_hz),
            self.platform,
            *self.platform.devices,
            *uarts,
            GlobalState(),
            bus,
        ):
            keep(device)
        self.cards = [keep(bus.add(on_tap(nic))) for nic in config.nics]
        for name in config.devices:
            keep(bus.add(DEVICES.get(name)))
        for device in self.devices:
            for region in device.regions:
                self.vm.add_mmio(region.ipa, region.size, region.device)

    def _load(self, config: MachineConfig, image: Image, device_tree: bytes) -> None:
        place(image, device_tree, config.board, self.ram.write)
        self.platform.start(image.entry, self.ram)

    def pause_devices(self) -> None:
        """No device touches guest RAM once this returns."""
        for device in self.devices:
            device.pause()

    def resume_devices(self) -> None:
        """Let the devices work."""
        for device in self.devices:
            device.resume()

    def close(self) -> None:
        """Stop the vCPUs and free everything. Not to be called from a vCPU's thread."""
        self._resources.close()
