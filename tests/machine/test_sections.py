"""Every byte that a machine saves of its CPUs and devices, and every device tree, by hash: a difference names the section."""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tests.machine.still import COUNTER, NAME, SocketTap, StillVm, still_accelerator

from sterna.arch.arm.board import ArmBoard
from sterna.machine import devicetree, sections
from sterna.machine.board import BOARDS
from sterna.machine.config import MachineConfig
from sterna.machine.devices.device import Stopped
from sterna.machine.devices.gic.registers import CpuInterface, Distributor
from sterna.machine.devices.pl011 import Register
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine as Guest
from sterna.machine.nicconfig import NicConfig
from sterna.machine.tap import Tap
from sterna.machine.virtio.mmio import Register as Virtio
from sterna.machine.virtio.mmio import Status
from sterna.machine.virtio.net import announcement
from sterna.ownership import Event
from sterna.stream.vmstate import SUBSECTIONS, DeviceState, StreamError

SMP = 2
SECTIONS: dict[str, list[str]] = {
    "virt": [
        "timer 0 v2 24 d95e1d791a55021e",
        "cpu_common 0 v1 8 af5570f5a1810b7a",
        "cpu 0 v22 4432 2ecef563245dbd0e",
        "cpu_common 1 v1 8 af5570f5a1810b7a",
        "cpu 1 v22 4432 08a54180c5947280",
        "arm_gic 0 v12 9888 894e7e2696483229",
        "pl011 0 v2 149 5d1967ed836775b6",
        "globalstate 0 v1 104 796590fc28600106",
    ],
    "vexpress-a15": [
        "timer 0 v2 24 d95e1d791a55021e",
        "cpu_common 0 v1 8 af5570f5a1810b7a",
        "cpu 0 v22 4432 a2a963e2f33d3e18",
        "cpu_common 1 v1 8 af5570f5a1810b7a",
        "cpu 1 v22 4432 f74079be192f0396",
        "arm_gic 0 v12 9888 739e8290dc045d9c",
        "pl011 0 v2 149 5d1967ed836775b6",
        "pl011 1 v2 149 3b7d0c080481e2f4",
        "pl011 2 v2 149 f7a719adfc69d780",
        "pl011 3 v2 149 1d139dac6f2aadce",
        "globalstate 0 v1 104 796590fc28600106",
    ],
    "virt-arm64": [
        "timer 0 v2 24 d95e1d791a55021e",
        "arm64-cpu 0 v1 917 34cf3934537c041c",
        "arm64-cpu 1 v1 917 8fb956de31217459",
        "arm_gic 0 v12 9888 bbd83b23c9251ddd",
        "pl011 0 v2 149 5d1967ed836775b6",
        "globalstate 0 v1 104 796590fc28600106",
    ],
    "pc-min": [
        "timer 0 v2 24 7eb53a129d9a1ad5",
        "x86-cpu 0 v1 1497 052da353be0a9ba0",
        "x86-cpu 1 v1 1497 d5c6105b4f7c30a7",
        "pl011 0 v2 149 5d1967ed836775b6",
        "globalstate 0 v1 104 796590fc28600106",
    ],
}
CARDS: dict[str, list[str]] = {
    "virt": [
        "virtio-mmio@000000000a003e00/virtio-net 0 v11 44801 3a800c03890a629d",
        "virtio-mmio@000000000a003c00/virtio-net 0 v11 44801 a54e0dc3b7650201",
    ],
    "vexpress-a15": [
        "virtio-mmio@000000001c130600/virtio-net 0 v11 44801 07bd9434311ff14d",
        "virtio-mmio@000000001c130400/virtio-net 0 v11 44801 08b1e80ffeb5a1ae",
    ],
    "virt-arm64": [
        "virtio-mmio@000000000a003e00/virtio-net 0 v11 44801 3a800c03890a629d",
        "virtio-mmio@000000000a003c00/virtio-net 0 v11 44801 a54e0dc3b7650201",
    ],
    "pc-min": [
        "virtio-mmio@000000000a003e00/virtio-net 0 v11 44801 3a800c03890a629d",
        "virtio-mmio@000000000a003c00/virtio-net 0 v11 44801 a54e0dc3b7650201",
    ],
}
"""Sections of the first and the second network card."""
DEVICE_TREES: dict[tuple[str, int, int], str] = {
    ("virt", 1, 0): "1429 bc0d043844a36ed0",
    ("virt", 1, 1): "1558 c641aa73d071eee9",
    ("virt", 1, 2): "1674 3737e539927bb704",
    ("virt", 4, 0): "1717 fbb325bb812c835e",
    ("virt", 4, 1): "1846 92df8b2d07536728",
    ("virt", 4, 2): "1962 10d8158d5628ee24",
    ("vexpress-a15", 1, 0): "1716 7ebfeab471e79e02",
    ("vexpress-a15", 1, 1): "1849 2ce431a7bc1f1373",
    ("vexpress-a15", 1, 2): "1969 fa463dba45b30ed5",
    ("vexpress-a15", 4, 0): "1944 02977b175d19383d",
    ("vexpress-a15", 4, 1): "2077 2cc61d6ee6ba37cf",
    ("vexpress-a15", 4, 2): "2197 52a0edc6907e6a73",
    ("virt-arm64", 1, 0): "1425 333522ca82200021",
    ("virt-arm64", 1, 1): "1554 3971aab06954f23d",
    ("virt-arm64", 1, 2): "1670 0c98a532f60f4854",
    ("virt-arm64", 4, 0): "1701 db5c2a7db791a565",
    ("virt-arm64", 4, 1): "1830 e1e7a2dbe001e873",
    ("virt-arm64", 4, 2): "1946 db14926c260e2fc3",
    ("pc-min", 1, 0): "577 0f8161d58f39b09a",
    ("pc-min", 1, 1): "657 8fd0c810fef639f9",
    ("pc-min", 1, 2): "737 aa7371295d9406ba",
    ("pc-min", 4, 0): "793 2a32834befd535f7",
    ("pc-min", 4, 1): "873 14b90da7c8310f00",
    ("pc-min", 4, 2): "953 4b2ee3ba8bbae6fb",
}
"""By board, CPUs and network cards."""


def digest(data: bytes) -> str:
    return f"{len(data)} {hashlib.sha256(data).hexdigest()[:16]}"


@pytest.fixture
def make(
    make_machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[Machine, StillVm]]:
    """Makes machines whose vCPUs stand still."""
    made: list[StillVm] = []
    still_accelerator(made)
    monkeypatch.setattr(Tap, "open", SocketTap)

    def make(board: str, cards: int, *, incoming: bool = False) -> tuple[Machine, StillVm]:
        machine = make_machine(
            accel=NAME,
            machine=board,
            smp=SMP,
            nics=tuple(NicConfig(f"tap{number}") for number in range(cards)),
            incoming=incoming,
            paused=True,
        )
        return machine, made[-1]

    return make


def use(machine: Machine, vm: StillVm, cards: int) -> None:
    """Leave no register of a device as it was at reset."""
    board = machine.config.board
    for number, uart in enumerate(board.uarts):
        for register, value in (
            (Register.IBRD, 0x1234 + number),
            (Register.FBRD, 0x15),
            (Register.LCR_H, 0x70),
            (Register.CR, 0x301),
            (Register.IFLS, 0x24),
            (Register.DMACR, 5),
            (Register.ILPR, 0x42),
            (Register.DR, ord("x")),  # sent, which raises the interrupt
            (Register.IMSC, 0x7FF),
        ):
            vm.write(uart.base + register, value)
    machine.serial.send(b"input")  # type: ignore[attr-defined]
    if isinstance(board, ArmBoard):
        base = board.gic.distributor
        for offset, value in (
            (Distributor.CTLR, 1),
            (Distributor.IGROUPR + 4, 0xF0),
            (Distributor.ISENABLER, 0x0800_0000),
            (Distributor.ISENABLER + 4, 0xFFFF_FFFF),
            (Distributor.IPRIORITYR + 24, 0x4030_2010),
            (Distributor.IPRIORITYR + 32, 0x5060_7080),
            (Distributor.ITARGETSR + 32, 0x0201_0302),
            (Distributor.ICFGR + 8, 0xAAAA_0008),
            (Distributor.ISPENDR + 8, 0x100),
            (Distributor.SGIR, 0x0002_0005),
        ):
            vm.write(base + offset, value)
        for cpu in range(SMP):
            for offset, value in ((CpuInterface.PMR, 0xF0), (CpuInterface.BPR, 2), (CpuInterface.CTLR, 1)):
                vm.write(board.gic.cpu_interface + offset, value, cpu=cpu)
        vm.read(board.gic.cpu_interface + CpuInterface.IAR, cpu=1)
    for number in range(cards):
        start_driver(machine, vm, number)


def start_driver(machine: Machine, vm: StillVm, number: int) -> None:
    """Set a card's queues up, the second one only half."""
    board = machine.config.board
    base, ram = board.virtio.address(board.virtio.slot_of(number)), board.ram_base + (number << 20)
    vm.write(base + Virtio.STATUS, Status.ACKNOWLEDGE | Status.DRIVER)
    for half, features in enumerate((1 << 5, 1)):
        vm.write(base + Virtio.DRIVER_FEATURES_SEL, half)
        vm.write(base + Virtio.DRIVER_FEATURES, features)
    vm.write(base + Virtio.STATUS, Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK)
    for queue in (0, 1):
        vm.write(base + Virtio.QUEUE_SEL, queue)
        vm.write(base + Virtio.QUEUE_NUM, 64)
        for at, register in enumerate(
            (Virtio.QUEUE_DESC_LOW, Virtio.QUEUE_DRIVER_LOW, Virtio.QUEUE_DEVICE_LOW)
        ):
            vm.write(base + register, ram + 0x1_0000 * queue + 0x4000 * at)
            vm.write(base + register + 4, 0 if queue == 0 else 7)
    vm.write(base + Virtio.QUEUE_SEL, 0)
    vm.write(base + Virtio.QUEUE_READY, 1)
    vm.write(base + Virtio.STATUS, vm.read(base + Virtio.STATUS) | Status.DRIVER_OK)


def saved(machine: Machine, vm: StillVm) -> list[DeviceState]:
    Guest(machine).stop_for_migration()
    return Guest(machine).save_devices()


def wire(machine: Machine, states: list[DeviceState]) -> list[bytes]:
    layouts = Guest(machine).descriptions
    return [layouts[state.name].encode(state) for state in states]


def told(machine: Machine, states: list[DeviceState]) -> list[str]:
    bodies = wire(machine, states)
    return [
        f"{state.name} {state.instance_id} v{state.version} {digest(body)}"
        for state, body in zip(states, bodies, strict=True)
    ]


@pytest.mark.parametrize("cards", [0, 1, 2])
@pytest.mark.parametrize("board", list(BOARDS))
def test_sections(make: Callable[..., tuple[Machine, StillVm]], board: str, cards: int) -> None:
    """What a machine saves, and what one saves that has loaded it."""
    here, vm = make(board, cards)
    here.cont()
    vm.set_counter(COUNTER)
    here.stop()
    use(here, vm, cards)
    states = saved(here, vm)
    expected = SECTIONS[board] + CARDS[board][:cards]
    assert told(here, states) == expected
    there, vm = make(board, cards, incoming=True)
    there.ram_blocks[0].data[:] = here.ram_blocks[0].data
    Guest(there).load_devices(
        [
            Guest(there).descriptions[state.name].decode(body, name=state.name, instance_id=state.instance_id)
            for state, body in zip(states, wire(here, states), strict=True)
        ]
    )
    there.ownership.apply(Event.TAKEN_OVER, bytes(16))
    Guest(there).resume()
    assert told(there, saved(there, vm)) == expected


def without_features(state: DeviceState) -> dict[str, Any]:
    return {"virtio": state.fields["virtio"] | {SUBSECTIONS: ()}}


CARD = "virtio-mmio@000000000a003e00/virtio-net"
WRONG: dict[str, Callable[[DeviceState], dict[str, Any]]] = {
    "timer": lambda state: {"cpu_clock_offset": -1},
    "cpu": lambda state: {"cpsr": 0x1DA},
    "arm_gic": lambda state: {"ctlr": 4},
    "pl011": lambda state: {"read_pos": 16},
    "globalstate": lambda state: {"runstate": b"dancing".ljust(100, b"\0")},
    CARD: without_features,
}
"""Of each section, what no machine can have."""


def changed(states: list[DeviceState], *names: str) -> list[DeviceState]:
    return [
        replace(state, fields=state.fields | WRONG[state.name](state)) if state.name in names else state
        for state in states
    ]


def test_whatever_is_wrong_nothing_is_loaded(make: Callable[..., tuple[Machine, StillVm]]) -> None:
    here, vm = make("virt", 1)
    use(here, vm, 1)
    states = saved(here, vm)
    there, _ = make("virt", 1, incoming=True)
    there.ram_blocks[0].data[:] = here.ram_blocks[0].data
    before = wire(there, sections.save(there.hardware.devices, Stopped()))
    for name in WRONG:
        with pytest.raises(StreamError, match=f"section '{name}"):
            Guest(there).load_devices(changed(states, name))
        if name != "globalstate":
            with pytest.raises(StreamError, match=f"section '{name}.*is missing"):
                Guest(there).load_devices([state for state in states if state.name != name])
        assert wire(there, sections.save(there.hardware.devices, Stopped())) == before
    Guest(there).load_devices(states)
    assert wire(there, sections.save(there.hardware.devices, Stopped())) != before


def test_of_several_that_are_wrong_the_one_is_told_that_the_user_chose(
    make: Callable[..., tuple[Machine, StillVm]],
) -> None:
    here, vm = make("virt", 1)
    states = saved(here, vm)
    there, _ = make("virt", 1, incoming=True)
    with pytest.raises(
        StreamError, match=rf"'{CARD}': the section is missing.*a network card there \(--nic, tap tap0\)"
    ):
        Guest(there).load_devices([])
    with pytest.raises(StreamError, match=f"'{CARD}'.*force-legacy=false"):
        Guest(there).load_devices(changed(states, *WRONG))
    with pytest.raises(StreamError, match=f"'{CARD} 0': the section comes twice"):
        Guest(there).load_devices([*states, states[-1]])
    with pytest.raises(StreamError, match=f"'{CARD} 1': the section comes twice"):
        Guest(there).load_devices([*states, replace(states[-1], instance_id=1)])


def test_every_card_announces_a_guest_that_has_come(make: Callable[..., tuple[Machine, StillVm]]) -> None:
    machine, _ = make("virt", 2)
    Guest(machine).announce([0.0])
    machine.cont()
    for card in machine.hardware.cards:
        card.network.far.settimeout(300)  # type: ignore[attr-defined]
        assert card.network.far.recv(4096) == announcement(card.mac)  # type: ignore[attr-defined]
    machine.stop()
    assert {tap: counts["announced"] for tap, counts in machine.network_counts().items()} == {
        "tap0": 1,
        "tap1": 1,
    }


@pytest.mark.parametrize("cards", [0, 1, 2])
@pytest.mark.parametrize("smp", [1, 4])
@pytest.mark.parametrize("board", list(BOARDS))
def test_device_trees(board: str, smp: int, cards: int) -> None:
    nics = tuple(NicConfig(f"tap{number}") for number in range(cards))
    blob = devicetree.build(MachineConfig(machine=board, smp=smp, nics=nics, append="7 600"))
    assert digest(blob) == DEVICE_TREES[board, smp, cards]
    assert struct.unpack(">I", blob[:4]) == (0xD00D_FEED,)
