"""The virtio entropy device: what its driver gets, that it is logged, its section, and its way to other machines."""

import dataclasses
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fdt
import pytest
from tests.machine.virtiodriver import (
    AVAIL,
    BASE,
    ENTRIES,
    NEXT,
    RAM_BYTES,
    USED,
    WRITE,
    Driver,
    guest_ram,
)
from tests.migration.test_from_qemu import arrived, capabilities, send
from tests.migration.test_qemu import qemu
from tests.savedstream import saved, saving

from sterna.guests import catalog
from sterna.machine import devicetree
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.guestram import GuestRam
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine
from sterna.machine.runstate import RunState
from sterna.machine.virtio.device import Port, VirtioDevice
from sterna.machine.virtio.devices.virtio_rng import MAX_BYTES, VirtioRng
from sterna.machine.virtio.mmio import VERSION_1, Interrupt, Register, Status, TransportState, VirtioMmio
from sterna.machine.virtio.queue import QueueError, QueueState
from sterna.machine.virtio.section import layout, load_virtio, save_virtio
from sterna.memory.bitmap import DirtyBatch, page_numbers
from sterna.migration.controller import MigrationController
from sterna.stream.body import BytesSource
from sterna.stream.vmstate import DeviceState, StreamError

TIMEOUT = 300.0
BUFFERS = BASE + 0x20_0000
NAME = "virtio-mmio@000000000a003e00/virtio-rng"
LAYOUT = layout(VirtioRng.kind)


class RngDriver(Driver):
    """A driver that asks for random bytes.

    :cvar buffers: address of the first of its buffers
    """

    buffers = BUFFERS

    def ask(self, size: int = 64, index: int = 0, *, notify: bool = True) -> None:
        self.describe(0, index, self.buffers + 4096 * index, size, WRITE)
        self.offer(0, index, notify=notify)

    def got(self, index: int = 0, size: int = 64) -> bytes:
        return self.peek(self.buffers + 4096 * index, size)


@dataclass
class Rig(RngDriver):
    """The device with its driver."""

    ram: GuestRam
    port: Port
    rng: VirtioRng
    levels: list[bool]
    offered: list[int] = field(default_factory=lambda: [0])

    @property
    def transport(self) -> VirtioMmio:
        return self.rng.transport


@contextmanager
def rig(*, logging: bool = False) -> Iterator[Rig]:
    with guest_ram(logging=logging) as ram:
        levels: list[bool] = []
        port = Port(BASE, ram, levels.append)
        made = Rig(ram, port, VirtioRng(port), levels)
        made.rng.resume()
        yield made
        del made.ram


@pytest.fixture
def device() -> Iterator[Rig]:
    with rig() as made:
        yield made


# -- requests ------------------------------------------------------------------------------------------------------------


def test_it_tells_what_it_is(device: Rig) -> None:
    assert device.read(Register.DEVICE_ID) == 4
    assert device.read(Register.DEVICE_FEATURES) == 0
    device.write(Register.DEVICE_FEATURES_SEL, 1)
    assert device.read(Register.DEVICE_FEATURES) == 1, "VERSION_1"
    for number, limit in ((0, 8), (1, 0)):
        device.write(Register.QUEUE_SEL, number)
        assert device.read(Register.QUEUE_NUM_MAX) == limit
    assert device.read(0x100) == 0, "there is no configuration"


def test_a_request_is_filled_and_no_two_alike(device: Rig) -> None:
    device.start()
    device.ask(64, 0)
    assert device.used(0) == [(0, 64)]
    assert device.read(Register.INTERRUPT_STATUS) == Interrupt.USED_BUFFER
    assert device.levels[-1] is True
    device.ask(64, 1)
    first, second = device.got(0), device.got(1)
    assert len({first, second, bytes(64)}) == 3
    assert device.got(0, 4096)[64:] == bytes(4096 - 64), "nothing beyond"


def test_a_request_in_several_descriptors(device: Rig) -> None:
    device.start()
    for index in range(3):
        flags = WRITE | (NEXT if index < 2 else 0)
        device.describe(0, index, BUFFERS + 4096 * index, 40, flags, index + 1)
    device.offer(0, 0)
    assert device.used(0) == [(0, 120)]
    parts = {device.got(index, 40) for index in range(3)}
    assert len(parts | {bytes(40)}) == 4


def test_a_large_request_gets_a_part(device: Rig) -> None:
    device.start()
    device.ask(1 << 20)
    assert device.used(0) == [(0, MAX_BYTES)]
    assert device.got(0, MAX_BYTES + 8)[MAX_BYTES:] == bytes(8)


def test_while_it_is_paused_requests_wait(device: Rig) -> None:
    device.start()
    device.rng.pause()
    device.ask(64, 0)
    device.ask(64, 1, notify=False)
    assert device.used(0) == []
    assert device.got() == bytes(64)
    device.rng.resume()
    assert device.used(0) == [(0, 64), (1, 64)]


def test_what_it_writes_is_logged_and_nothing_else() -> None:
    with rig(logging=True) as device:
        device.start()
        device.ram.harvest()
        device.ask(64, 5)
        dirty = page_numbers(device.ram.harvest().words)
        assert [BASE + 4096 * int(page) for page in dirty] == [USED, BUFFERS + 4096 * 5]


# -- drivers that break the rules ----------------------------------------------------------------------------------------


def nothing_to_fill(device: Rig) -> None:
    device.describe(0, 0, BUFFERS, 64)
    device.offer(0, 0)


def no_room(device: Rig) -> None:
    device.ask(0)


def outside_ram(device: Rig) -> None:
    device.describe(0, 0, BASE + RAM_BYTES - 8, 64, WRITE)
    device.offer(0, 0)


def endless(device: Rig) -> None:
    device.describe(0, 0, BUFFERS, 64, WRITE | NEXT, 1)
    device.describe(0, 1, BUFFERS, 64, WRITE | NEXT, 0)
    device.offer(0, 0)


def too_many(device: Rig) -> None:
    device.poke(AVAIL + 2, (ENTRIES + 1).to_bytes(2, "little"))
    device.write(Register.QUEUE_NOTIFY, 0)


@pytest.mark.parametrize("breach", [nothing_to_fill, no_room, outside_ram, endless, too_many])
def test_a_broken_driver_stops_its_device_until_a_reset(device: Rig, breach: Callable[[Rig], None]) -> None:
    device.start()
    breach(device)
    assert device.read(Register.STATUS) & Status.NEEDS_RESET
    assert device.read(Register.INTERRUPT_STATUS) == Interrupt.CONFIG
    assert device.used(0) == []
    device.start()
    device.ask()
    assert device.used(0) == [(0, 64)]


# -- state ---------------------------------------------------------------------------------------------------------------


def wire(state: TransportState) -> DeviceState:
    return LAYOUT.decode(
        LAYOUT.encode(save_virtio(VirtioRng.kind, NAME, state, config=b"", own={})), name=NAME
    )


def fresh() -> TransportState:
    return TransportState(driver_features=VERSION_1, queues=[QueueState(8)])


def test_it_goes_on_where_another_was_and_answers_what_nobody_will_tell_of(device: Rig) -> None:
    device.start()
    for index in range(3):
        device.ask(64, index)
    device.rng.pause()
    device.ask(64, 3)
    state = load_virtio(VirtioRng.kind, wire(device.transport.save()))
    device.rng = other = VirtioRng(device.port)
    other.transport.check(state)
    other.transport.load(state)
    assert device.levels[-1] is True, "an interrupt that the driver has not seen is still there"
    assert len(device.used(0)) == 3
    other.resume()
    assert device.used(0) == [(index, 64) for index in range(4)]
    assert device.got(3) != bytes(64)
    device.ask(64, 4)
    assert device.used(0)[-1] == (4, 64)


def test_a_state_that_ram_contradicts(device: Rig) -> None:
    device.start()
    device.ask()
    device.rng.pause()
    state = device.transport.save()
    state.queues[0] = dataclasses.replace(state.queues[0], last_avail=200)
    with pytest.raises(QueueError, match="queue 0: 200 chains taken and 1 given back"):
        device.transport.check(state)


def test_features_that_it_has_not() -> None:
    state = dataclasses.replace(fresh(), driver_features=VERSION_1 | 1 << 5)
    with pytest.raises(StreamError, match=f"'{NAME}'.*features that this device has not: bits 5"):
        load_virtio(VirtioRng.kind, wire(state))


def test_the_device_tree_has_its_transport_behind_those_of_cards() -> None:
    tree = fdt.parse_dtb(devicetree.build(MachineConfig(devices=("virtio-rng", "virtio-rng"))))
    names = sorted(node.name for node in tree.root.nodes if node.name.startswith("virtio"))
    assert names == ["virtio_mmio@a003c00", "virtio_mmio@a003e00"]
    with pytest.raises(ConfigError, match=r"device: 5 asked for besides 0 network cards, .* has room for 4"):
        MachineConfig(machine="vexpress-a15", devices=("virtio-rng",) * 5)


# -- machines ------------------------------------------------------------------------------------------------------------


class MachineDriver(RngDriver):
    """A driver in a machine's RAM, where a test is in the guest's place; what it writes is logged."""

    buffers = BASE + 0x100_0000

    def __init__(self, machine: Machine) -> None:
        self.ram = machine.hardware.ram
        self.offered = [0]
        [self._device] = (one for one in machine.hardware.devices if isinstance(one, VirtioDevice))

    @property
    def transport(self) -> VirtioMmio:
        return self._device.transport

    def poke(self, address: int, data: bytes) -> None:
        self.ram.write(address, data)


class Asking(MigratableMachine):
    """A machine whose driver asks for more when the first pass is over."""

    driver: MachineDriver
    looks = 0

    def harvest(self) -> list[DirtyBatch]:
        self.looks += 1
        if self.looks == 1:
            self.driver.ask(64, 1)
        return super().harvest()


def test_a_machine_takes_it_along(make_machine: Callable[..., Machine]) -> None:
    """Requests before, during and after a migration: what the guest has got is there, and the ring goes on."""
    here = make_machine(kernel="clock", append="10", devices=("virtio-rng",))
    there = make_machine(incoming=True, devices=("virtio-rng",))
    driver = MachineDriver(here)
    driver.start()
    here.cont()
    driver.ask(64, 0)
    guest = Asking(here)
    guest.driver = driver
    with (
        MigrationController(guest) as source,
        MigrationController(MigratableMachine(there)) as destination,
    ):
        source.migrate(destination.incoming("tcp:127.0.0.1:0"))
        info = source.wait(TIMEOUT)
        assert info.status.value == "completed", info.error
        assert info.verified
    assert there.run_state is RunState.RUNNING
    after = MachineDriver(there)
    after.offered = driver.offered
    assert after.used(0) == [(0, 64), (1, 64)]
    assert [after.got(index) for index in (0, 1)] == [driver.got(index) for index in (0, 1)]
    assert bytes(64) not in (after.got(0), after.got(1))
    after.ask(64, 2)
    assert after.used(0)[2:] == [(2, 64)]
    assert after.got(2) != bytes(64)
    assert driver.got(2) == bytes(64)


def test_a_machine_without_it_is_no_place_for_its_guest(make_machine: Callable[..., Machine]) -> None:
    here = make_machine(kernel="clock", devices=("virtio-rng",))
    guest = MigratableMachine(here)
    guest.stop_for_migration()
    states = guest.save_devices()
    assert [state.name for state in states][-1] == NAME
    without = MigratableMachine(make_machine(incoming=True))
    with pytest.raises(StreamError, match=f"'{NAME} 0'.*no such device"):
        without.load_devices(states)
    there = MigratableMachine(make_machine(incoming=True, devices=("virtio-rng",)))
    with pytest.raises(
        StreamError, match=rf"'{NAME}'.*missing.*a random number generator there \(--device virtio-rng\)"
    ):
        there.load_devices(states[:-1])
    there.load_devices(states)


# -- QEMU ----------------------------------------------------------------------------------------------------------------

QEMUS = (
    *("-m", "32", "-global", "virtio-mmio.force-legacy=false", "-device", "virtio-rng-device"),
    *("-kernel", str(catalog.find("clock", "virt")), "-append", "10"),
)


@pytest.mark.qemu
def test_qemus_section_has_the_same_bytes(tmp_path: Path) -> None:
    file = tmp_path / "stream"
    with qemu(tmp_path, *QEMUS) as peer:
        capabilities(peer)
        send(peer, saving(file))
    stream = saved(file)
    key = bytes((len(NAME),)) + NAME.encode() + struct.pack(">II", 0, LAYOUT.version)
    [_, rest] = stream.split(key)
    source = BytesSource(rest, NAME)
    state = LAYOUT.decode(source, name=NAME)
    body = rest[: len(rest) - source.left]
    assert LAYOUT.encode(state) == body
    ours = save_virtio(VirtioRng.kind, NAME, load_virtio(VirtioRng.kind, state), config=b"", own={})
    assert LAYOUT.encode(ours) == body


@pytest.mark.qemu
def test_a_guest_with_it_comes_from_qemu_and_goes_there(
    make_machine: Callable[..., Machine], tmp_path: Path
) -> None:
    here = make_machine(incoming=True, devices=("virtio-rng",))
    with MigrationController(MigratableMachine(here)) as migration:
        with qemu(tmp_path, *QEMUS) as peer:
            capabilities(peer)
            send(peer, migration.incoming(f"unix:{tmp_path}/in"))
            arrived(migration)
        driver = MachineDriver(here)
        driver.start()
        here.cont()
        driver.ask()
        assert driver.used(0) == [(0, 64)]
        with qemu(tmp_path, *QEMUS, "-incoming", f"unix:{tmp_path}/back") as peer:
            migration.migrate(f"unix:{tmp_path}/back")
            info = migration.wait(TIMEOUT)
            assert (info.status.value, info.peer) == ("completed", "qemu"), info.error
            end = time.monotonic() + TIMEOUT
            while peer.ask("query-status")["status"] == "inmigrate":
                assert time.monotonic() < end
