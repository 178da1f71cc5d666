"""Guests with a network card, live: from and to QEMU, to destinations that cannot take it, and announced where they come."""

import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from sterna.guests.layout import STATUS_OFFSET, NetWord
from sterna.launch.guestview import guest_status
from sterna.launch.host import Host
from sterna.launch.process import VmProcess
from sterna.machine.virtio.net import announcement
from sterna.testbed.kind import KindOptions
from sterna.testbed.kinds import VM_KINDS
from sterna.testbed.network import GuestNic, NamespaceNetwork, guest_nic
from sterna.testbed.probes import Pinger, Session, internet_checksum
from sterna.testbed.settings import VmSettings

RAM = 0x4000_0000
NIC = guest_nic()
TIMEOUT = 300.0
SETTINGS = VmSettings(memory="16M", program="net", arguments="100")
ETH_P_RARP = 0x8035


@pytest.fixture
def network(root: None) -> Iterator[NamespaceNetwork]:
    with NamespaceNetwork(0) as made:
        yield made


@pytest.fixture
def start(network: NamespaceNetwork) -> Iterator[Callable[..., VmProcess]]:
    """Starts VMs with the first guest's card: `start(kind, host, port)`; without a port, with the guest."""
    with ExitStack() as stack:

        def make(kind: str, host: int, port: int = 0, *, nic: GuestNic | None = NIC) -> VmProcess:
            where = network.hosts[host]
            network.attach(where, NIC)
            maker = VM_KINDS.get(kind)(KindOptions())
            if port:
                vm = maker.destination(f"destination {port}", where, SETTINGS, port, hold=False, nic=nic)
            else:
                vm = maker.source("source", where, SETTINGS, nic)
                network.route_guest(NIC.address, where)
            stack.enter_context(vm).ready()
            return vm

        yield make


def migrate(source: VmProcess, destination: VmProcess, uri: str) -> dict[str, Any]:
    """The outcome at the source; the destination is not waited for."""
    states = [{"capability": "return-path", "state": True}]
    source.command("migrate-set-capabilities", capabilities=states)
    source.command("migrate", uri=uri)
    end = time.monotonic() + TIMEOUT
    while (info := source.command("query-migrate"))["status"] not in ("completed", "failed"):
        assert time.monotonic() < end, info
        time.sleep(0.02)
    return info  # type: ignore[no-any-return]


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def count(vm: VmProcess, word: NetWord) -> int:
    status = guest_status(vm, RAM + STATUS_OFFSET)
    assert status is not None
    return status.word(0, word)


@pytest.mark.usefixtures("qemu")
def test_to_qemu_and_back(network: NamespaceNetwork, start: Callable[..., VmProcess]) -> None:
    """By way of a destination that has no card and so cannot take the guest; and it is announced where it comes in the end."""
    address = NIC.address
    source = start("emulated", 0)
    without = start("emulated", 1, 4321, nic=None)
    qemu = start("qemu", 1, 4322)
    pinger = Pinger(network.server, address, time.monotonic)
    with pinger, Session(network.server, address, time.monotonic) as session:
        assert pinger.wait_answers(10, TIMEOUT)
        info = migrate(source, without, without.incoming_uri())
        assert info["status"] == "failed"
        assert "'virtio-mmio@000000000a003e00/virtio-net'" in info["error-desc"]
        assert pinger.wait_answers(pinger.answered + 20, TIMEOUT), "the guest goes on here, its card too"

        said = source.command("human-monitor-command", command_line="info network")
        assert re.fullmatch(r"tap0: received \d\d+, sent \d\d+, dropped 0, announced 0\s+", said)

        info = migrate(source, qemu, f"tcp:{qemu.host.address}:4322")
        assert info["status"] == "completed", info
        wait_until(qemu.runs)
        network.route_guest(address, qemu.host)
        assert pinger.wait_answers(pinger.answered + 20, TIMEOUT)
        assert session.wait_answers(session.answered + 3, TIMEOUT)
        source.close()

        back = start("emulated", 0, 4323)
        back.command("migrate-set-parameters", announce_rounds=3, announce_initial=1, announce_step=1)
        # QEMU 7.2 loses writes of a guest that runs while it migrates.
        qemu.command("stop")
        with listen_for_announcements(back.host) as packets:
            assert migrate(qemu, back, f"tcp:{back.host.address}:4323")["status"] == "completed"
            wait_until(lambda: back.command("query-status")["status"] == "paused")
            back.command("cont")
            network.route_guest(address, back.host)
            mac = bytes.fromhex(NIC.mac.replace(":", ""))
            for _ in range(3):
                assert packets.recv(2048) == announcement(mac)
        assert pinger.wait_answers(pinger.answered + 20, TIMEOUT)
        assert session.wait_answers(session.answered + 3, TIMEOUT)
    assert count(back, NetWord.LOST) == 0
    assert count(back, NetWord.ICMP) >= pinger.answered
    assert count(back, NetWord.UDP) >= session.answered


def listen_for_announcements(host: Host) -> socket.socket:
    """What comes out of the guest's tap there."""

    def listen() -> socket.socket:
        packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_RARP))
        packets.bind((NIC.tap, ETH_P_RARP))
        packets.settimeout(TIMEOUT)
        return packets

    assert host.namespace is not None
    return host.namespace.call(listen)


def test_hosts_look_alike_to_a_guest(network: NamespaceNetwork) -> None:
    nic = guest_nic(3)
    assert (nic.tap, nic.mac, nic.address) == ("tap3", "52:54:00:12:34:59", "10.83.9.4")
    macs = set()
    for host in network.hosts:
        network.attach(host, nic)
        network.attach(host, nic)
        assert host.namespace is not None

        def index() -> bytes:
            with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as packets:
                packets.bind((nic.tap, 0))
                return packets.getsockname()[4]  # type: ignore[no-any-return]

        macs.add(host.namespace.call(index))
    assert len(macs) == 1


@pytest.mark.parametrize("data", [b"", b"\x01", b"abcdef", b"\xff" * 7])
def test_the_internet_checksum(data: bytes) -> None:
    """As RFC 1071 has it: whoever sums data and checksum gets nothing."""
    even = data + bytes(len(data) % 2)
    assert internet_checksum(even + internet_checksum(data).to_bytes(2, "big")) == 0
