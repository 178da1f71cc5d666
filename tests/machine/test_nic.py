"""Network cards of a machine: what a user says of them, their taps, their state, and a guest that has one."""

import dataclasses
import os
from collections.abc import Callable, Iterator

import fdt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.machine.virtiodriver import MAC, Rig, SocketNetwork, rig

from sterna.machine import devicetree
from sterna.machine.board import BOARDS
from sterna.machine.config import ConfigError, MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.migratable import MigratableMachine as Guest
from sterna.machine.nicconfig import NicConfig, NicConfigError, parse_nic
from sterna.machine.tap import Tap, TapError
from sterna.machine.unmatched import judge_section
from sterna.machine.virtio.mmio import VERSION_1, Status, TransportState
from sterna.machine.virtio.net import VirtioNet, card_config, card_fields
from sterna.machine.virtio.queue import QueueError, QueueState
from sterna.machine.virtio.section import layout, load_virtio, save_virtio
from sterna.stream.vmstate import SUBSECTIONS, DeviceState, StreamError

NAME = "virtio-mmio@000000000a003e00/virtio-net"
U64, U16 = st.integers(0, (1 << 64) - 1), st.integers(0, 0xFFFF)


# -- what a user says ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "card"),
    [
        ("none", None),
        ("tap,ifname=tap0", NicConfig("tap0")),
        ("tap,fd=7,mac=52:54:00:AB:cd:ef", NicConfig("", 7, bytes.fromhex("525400abcdef"))),
        ("tap,ifname=t,model=virtio-net-device,script=no,downscript=no", NicConfig("t")),
    ],
)
def test_cards(text: str, card: NicConfig | None) -> None:
    assert parse_nic(text) == card


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is not known"),
        ("user", "'user' is not known; write none, or a tap such as tap,ifname=tap0"),
        ("tap", "say which tap"),
        ("tap,ifname=tap0,fd=3", "by ifname or by fd"),
        ("tap,ifname=", "cannot be an interface's name"),
        ("tap,ifname=a/b", "'a/b' cannot be an interface's name"),
        ("tap,ifname=abcdefghijklmnop", "1 to 15 characters"),
        ("tap,ifname=tap%d", "cannot be an interface's name"),
        ("tap,fd=x", "fd=x is not a number"),
        ("tap,fd=-1", "fd=-1 is not"),
        ("tap,ifname=t,ifname=u", "ifname is given twice"),
        ("tap,ifname=t,vhost=on", "'vhost=on' is not known; there are ifname, fd, mac"),
        ("tap,ifname=t,script=/bin/x", "only script=no is"),
        ("tap,ifname=t,model=e1000", "only model=virtio-net-device is"),
        ("tap,ifname=t,mac=52:54:00:12:34", "is not six hexadecimal bytes"),
        ("tap,ifname=t,mac=53:54:00:12:34:56", "it is a group's"),
        ("tap,ifname=t,mac=00:00:00:00:00:00", "all zeros"),
        ("tap,ifname=t,mac", "'mac' is not known"),
    ],
)
def test_cards_that_cannot_be(text: str, told: str) -> None:
    with pytest.raises(NicConfigError) as raised:
        parse_nic(text)
    assert told in str(raised.value)


@given(st.text(max_size=60))
def test_any_text_is_a_card_or_an_error(text: str) -> None:
    for candidate in (text, f"tap,{text}", f"tap,ifname={text}", f"tap,fd=3,mac={text}"):
        try:
            parse_nic(candidate)
        except NicConfigError:
            pass


def test_addresses_are_qemus_and_apart() -> None:
    config = MachineConfig(nics=(NicConfig("a"), NicConfig("b"), NicConfig("c", mac=MAC[:5] + b"\1")))
    assert [nic.mac.hex(":") for nic in config.nics if nic.mac] == [
        "52:54:00:12:34:56",
        "52:54:00:12:34:57",
        "52:54:00:12:34:01",
    ]
    with pytest.raises(ConfigError, match="two cards want the tap a"):
        MachineConfig(nics=(NicConfig("a"), NicConfig("a")))
    with pytest.raises(ConfigError, match="two cards have the MAC 52:54:00:12:34:56"):
        MachineConfig(nics=(NicConfig("a"), NicConfig("b", mac=MAC)))
    with pytest.raises(ConfigError, match="5 cards asked for, board vexpress-a15 has room for 4"):
        MachineConfig(machine="vexpress-a15", nics=tuple(NicConfig(f"t{i}") for i in range(5)))


def test_the_device_tree_has_the_cards_where_qemu_puts_them() -> None:
    blob = devicetree.build(MachineConfig(nics=(NicConfig("a"), NicConfig("b"))))
    tree = fdt.parse_dtb(blob)
    names = [node.name for node in tree.root.nodes if node.name.startswith("virtio")]
    assert sorted(names) == ["virtio_mmio@a003c00", "virtio_mmio@a003e00"]
    node = tree.get_node("/virtio_mmio@a003e00")
    assert node.get_property("compatible").value == "virtio,mmio"
    assert node.get_property("reg").data == [0, 0x0A00_3E00, 0, 0x200]
    assert node.get_property("interrupts").data == [0, 16 + 31, 1]
    assert all(board.virtio.count in (4, 32) for board in map(BOARDS.get, BOARDS))


# -- taps ----------------------------------------------------------------------------------------------------------------


def test_descriptors_that_are_no_tap() -> None:
    with pytest.raises(TapError, match="descriptor 9999 is not a tap that has been set up"):
        Tap.adopt(9999)
    with open("/dev/null", "rb") as null, pytest.raises(TapError, match="is not a tap"):
        Tap.adopt(null.fileno())


def test_a_guest_that_needs_a_card_is_told_so(make_machine: Callable[..., Machine]) -> None:
    from sterna.guests import GuestError

    with pytest.raises(GuestError, match="net: it needs a network card: --nic tap,ifname=tap0"):
        make_machine(kernel="net", append="10.83.9.1")


def test_a_guest_without_the_card_it_looks_for_says_so(make_machine: Callable[..., Machine]) -> None:
    """The board's transports are there, and have nothing behind them."""
    from sterna.guests import find

    machine = make_machine(kernel=str(find("net", "virt")), append="10.83.9.1")
    machine.cont()
    assert machine.serial.wait_for(b"net: error: there is no network device", 300)  # type: ignore[attr-defined]


# -- state ---------------------------------------------------------------------------------------------------------------


@st.composite
def queues(draw: st.DrawFn) -> QueueState:
    ready = draw(st.booleans())
    num = draw(st.sampled_from([1, 2, 64, 256])) if ready else draw(U16)
    return QueueState(256, num, ready, draw(U64), draw(U64), draw(U64), draw(U16))


@st.composite
def states(draw: st.DrawFn) -> TransportState:
    features = draw(st.sampled_from([0, VERSION_1, VERSION_1 | 1 << 5, VERSION_1 | 1 << 16 | 1 << 5]))
    return TransportState(
        status=draw(st.integers(0, 255)),
        interrupt_status=draw(st.integers(0, 3)),
        device_features_sel=draw(st.integers(0, 0xFFFF_FFFF)),
        driver_features_sel=draw(st.integers(0, 0xFFFF_FFFF)),
        queue_sel=draw(U16),
        driver_features=features,
        queues=[draw(queues()), draw(queues())],
    )


VIRTIO_NET = layout(VirtioNet.kind)


def save_net(state: TransportState) -> DeviceState:
    return save_virtio(VirtioNet.kind, NAME, state, config=card_config(MAC), own=card_fields(MAC))


def wire(state: TransportState) -> DeviceState:
    return VIRTIO_NET.decode(VIRTIO_NET.encode(save_net(state)))


@settings(max_examples=30, deadline=None)
@given(states())
def test_a_card_survives_the_wire(state: TransportState) -> None:
    section = wire(state)
    assert load_virtio(VirtioNet.kind, section) == state
    assert section.fields["virtio"]["mac"] == MAC


def fresh() -> TransportState:
    return TransportState(driver_features=VERSION_1, queues=[QueueState(256), QueueState(256)])


def test_the_section_is_as_long_as_qemus() -> None:
    assert len(VIRTIO_NET.encode(save_net(fresh()))) == 44780


def part(section: DeviceState, name: str) -> DeviceState:
    return next(sub for sub in section.fields["virtio"][SUBSECTIONS] if sub.name == name)


def without(section: DeviceState, name: str) -> None:
    virtio = section.fields["virtio"]
    virtio[SUBSECTIONS] = tuple(sub for sub in virtio[SUBSECTIONS] if sub.name != name)


def mmio(section: DeviceState) -> dict:  # type: ignore[type-arg]
    [state] = part(section, "virtio/extra_state").fields["extra_state"][SUBSECTIONS]
    return state.fields  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda s: without(s, "virtio/extra_state"), "force-legacy=false"),
        (lambda s: without(s, "virtio/virtqueues"), "<virtio/virtqueues>"),
        (lambda s: without(s, "virtio/64bit_features"), "<virtio/64bit_features>"),
        (
            lambda s: part(s, "virtio/64bit_features").fields.update(guest_features=VERSION_1 | 1 << 15),
            "features that this device has not: bits 15",
        ),
        (lambda s: s.fields["virtio"]["queue"].__delitem__(slice(1, None)), "1 queues where 2 belong"),
        (lambda s: mmio(s)["vqs"][2].update(enabled=True), "the guest uses queue 2"),
    ],
)
def test_cards_that_are_not_this_one(change: Callable[[DeviceState], None], told: str) -> None:
    section = wire(fresh())
    change(section)
    with pytest.raises(StreamError) as raised:
        load_virtio(VirtioNet.kind, section)
    assert told in str(raised.value)
    assert NAME in str(dataclasses.replace(section, name=NAME).name)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 8))
def test_a_damaged_section_is_a_state_or_an_error(seed: int, count: int) -> None:
    import random

    chance = random.Random(seed)
    body = bytearray(VIRTIO_NET.encode(save_net(fresh())))
    for _ in range(count):
        body[chance.choice((chance.randrange(700), chance.randrange(len(body))))] = chance.randrange(256)
    try:
        load_virtio(
            VirtioNet.kind,
            VIRTIO_NET.decode(bytes(body[: chance.choice((len(body), chance.randrange(len(body))))])),
        )
    except StreamError:
        pass


@pytest.fixture
def device() -> Iterator[Rig]:
    with rig() as made:
        yield made


def test_a_card_goes_on_where_another_was(device: Rig) -> None:
    """The indices go along, that of the used ring in guest RAM."""
    from tests.machine.test_virtio_net import BUFFERS, FRAME, HEADER, give_buffer, send, wait

    device.start()
    for index in range(3):
        send(device, index=index)
        assert device.network.far.recv(4096) == FRAME
    give_buffer(device, 4)
    wait(lambda: len(device.used(1)) == 3)
    device.net.pause()
    section = wire(device.net.transport.save())
    state, mac = load_virtio(VirtioNet.kind, section), section.fields["virtio"]["mac"]
    device.net.close()
    device.network = SocketNetwork()
    device.net = other = VirtioNet(device.network, mac, device.port)
    other.transport.check(state)
    other.transport.load(state)
    assert device.levels[-1] is True, "an interrupt that the driver has not seen is still there"
    other.resume()
    device.network.far.send(FRAME)
    wait(lambda: device.used(0) == [(4, len(FRAME) + 12)])
    assert device.peek(BUFFERS + 4096 * 4, 72)[12:] == FRAME
    device.poke(BUFFERS, HEADER + FRAME[::-1])
    device.describe(1, 0, BUFFERS, 72)
    device.offer(1, 0)
    assert device.network.far.recv(4096) == FRAME[::-1]
    wait(lambda: len(device.used(1)) == 4)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"num": 3}, "queue 1: 3 entries are no power of two up to 256"),
        ({"num": 512}, "queue 1: 512 entries"),
        ({"num": 0}, "queue 1: it is ready without entries"),
        ({"last_avail": 200}, "queue 1: 200 chains taken and 0 given back cannot be with 8 entries"),
        ({"used": 0}, "queue 1: the used ring: 2 bytes at 0x2 are not in RAM"),
    ],
)
def test_queues_that_ram_contradicts(device: Rig, change: dict[str, int], told: str) -> None:
    device.start()
    device.net.pause()
    state = device.net.transport.save()
    state.queues[1] = dataclasses.replace(state.queues[1], **change)  # type: ignore[arg-type]
    before = device.net.transport.save()
    with pytest.raises(QueueError) as raised:
        device.net.transport.check(state)
    assert told in str(raised.value)
    assert device.net.transport.save() == before


def test_a_guest_can_leave_a_card_behind_that_it_has_not_touched() -> None:
    judged = judge_section(DeviceState(NAME, 0, 11, wire(fresh()).fields))
    assert judged.harmless
    used = dataclasses.replace(fresh(), status=Status.DRIVER | Status.DRIVER_OK)
    judged = judge_section(DeviceState(NAME, 0, 11, wire(used).fields))
    assert not judged.harmless
    assert "virtio device status 0x06" in judged.reason


@pytest.mark.usefixtures("root")
def test_a_guest_without_the_card_does_not_come_to_a_machine_that_has_it(
    make_machine: Callable[..., Machine],
) -> None:
    from sterna.launch.host import Namespace

    namespace = Namespace()
    try:
        machine = namespace.call(lambda: make_machine(incoming=True, nics=(NicConfig("tap9"),)))
        with pytest.raises(StreamError, match=rf"{NAME}.*missing.*--nic, tap tap9"):
            Guest(machine).load_devices([])
        twice = [save_net(fresh())] * 2
        with pytest.raises(StreamError, match=f"{NAME} 0.*twice"):
            Guest(machine).load_devices(twice)
    finally:
        namespace.close()


@pytest.mark.usefixtures("root")
def test_a_tap_by_name_and_by_descriptor() -> None:
    from sterna.launch.host import Namespace

    namespace = Namespace()
    try:

        def inside() -> None:
            with pytest.raises(TapError, match="not a tap"):
                Tap.open("lo")
            tap = Tap.open("tap9")
            with pytest.raises(TapError, match="another process has it open"):
                Tap.open("tap9")
            again = Tap.adopt(os.dup(tap.fileno()))
            assert again.name == "tap9"
            assert tap.receive() is None
            assert not tap.send(bytes(60)), "the interface is down"
            again.close()
            tap.close()

        namespace.call(inside)
    finally:
        namespace.close()
