"""Two hosts and a server: as network namespaces behind a router, or all on the loopback address.

::

    host1 --- eth0 10.83.1.1 --- 10.83.1.254 ---+
    host2 --- eth0 10.83.2.1 --- 10.83.2.254 ---+--- router
    server -- eth0 10.83.3.1 --- 10.83.3.254 ---+

Guests have addresses of their own (10.83.9.0/24), and taps on the hosts (`attach`). The router leads a guest's address to
the host it is on, and switches when the guest moves: `route_guest`. To a guest all hosts look alike: its gateway has the
same address and the same MAC on each.
"""

from abc import abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from sterna.host.closing import Closing
from sterna.launch.errors import Unsupported
from sterna.launch.host import Host, Namespace
from sterna.testbed.links import Link, bring_up_loopback, make_tap, route

HOSTS = ("host1", "host2")
SERVER = "server"
_SUBNETS = {"host1": "10.83.1", "host2": "10.83.2", "server": "10.83.3"}
_GUEST_SUBNET = "10.83.9"
_GATEWAY_MAC = "02:00:0a:53:09:fe"
_FIRST_MAC = 0x52_54_00_12_34_56
_MAX_GUESTS = 200


@dataclass(frozen=True)
class GuestNic:
    """A guest's network card, the same on whichever host the guest is.

    :ivar tap: name of the tap device that a host has for it
    :ivar mac: the guest's
    :ivar address: the guest's, IPv4
    :ivar gateway: the host's on the tap, IPv4
    :ivar prefix: bits of the network that both are in
    """

    tap: str
    mac: str
    address: str
    gateway: str = f"{_GUEST_SUBNET}.254"
    prefix: int = 24


def guest_nic(number: int = 0) -> GuestNic:
    """The card of guest `number`, counted from 0."""
    assert 0 <= number < _MAX_GUESTS
    mac = (_FIRST_MAC + number).to_bytes(6, "big").hex(":")
    return GuestNic(f"tap{number}", mac, f"{_GUEST_SUBNET}.{1 + number}")


class Network(Closing):
    """Two hosts and a server. A context manager: closed at its end.

    :ivar hosts: host1, host2
    :ivar rate: bytes per second between any two, in each direction; 0 is no limit
    :ivar note: what it cannot do, for people; empty when all
    :ivar enforces_rate: whether the links keep to `rate` by themselves
    """

    hosts: tuple[Host, Host]
    server: Host
    rate: int
    note: str
    enforces_rate: bool

    @abstractmethod
    def set_link(self, host: Host, *, up: bool) -> None:
        """Plug or pull a host's cable; packets are dropped meanwhile.

        :raise Unsupported: When there is no cable.
        """

    @abstractmethod
    def attach(self, host: Host, nic: GuestNic) -> None:
        """Give a host the tap for a guest's card, unless it has it: `GuestNic.tap`, to be opened by the VM.

        :raise Unsupported: When there can be none.
        """

    @abstractmethod
    def route_guest(self, address: str, host: Host) -> None:
        """Lead a guest's address to `host` from now on.

        :raise Unsupported: When there is no router.
        """


class NamespaceNetwork(Network):
    """Hosts as network namespaces, joined by veth pairs and a router; a token bucket on every link.

    :param rate: bytes per second, 0 for no limit
    :raise Unsupported: When this process may not, or the kernel cannot.
    """

    note = ""
    enforces_rate = True

    def __init__(self, rate: int) -> None:
        self.rate = rate
        self._links: dict[str, Link] = {}
        self._guests: dict[str, str] = {}
        self._taps: set[tuple[str, str]] = set()
        with ExitStack() as self._opened:
            self._router = self._namespace()
            hosts = [self._join(name) for name in (*HOSTS, SERVER)]
            self._opened = self._opened.pop_all()
        self.hosts = hosts[0], hosts[1]
        self.server = hosts[2]

    def set_link(self, host: Host, *, up: bool) -> None:
        self._links[host.name].set(up=up)
        if up:
            # The kernel dropped the routes through the link with it.
            for address, name in self._guests.items():
                if name == host.name:
                    route(self._router, address, host.address)

    def attach(self, host: Host, nic: GuestNic) -> None:
        if (host.name, nic.tap) in self._taps:
            return
        assert host.namespace is not None
        make_tap(host.namespace, nic.tap, _GATEWAY_MAC, nic.gateway, nic.address)
        self._taps.add((host.name, nic.tap))

    def route_guest(self, address: str, host: Host) -> None:
        self._guests[address] = host.name
        route(self._router, address, host.address)

    def close(self) -> None:
        self._opened.close()

    def _namespace(self) -> Namespace:
        namespace = Namespace()
        self._opened.callback(namespace.close)
        bring_up_loopback(namespace)
        namespace.call(_forward)
        return namespace

    def _join(self, name: str) -> Host:
        subnet = _SUBNETS[name]
        namespace = self._namespace()
        link = Link(namespace, self._router, name, f"{subnet}.1", f"{subnet}.254", self.rate)
        self._links[name] = link
        return Host(name, f"{subnet}.1", namespace)


class LoopbackNetwork(Network):
    """All on 127.0.0.1: no cable, no router, no rate but the one that VMs keep to themselves."""

    enforces_rate = False

    def __init__(self, rate: int, why: str) -> None:
        self.rate = rate
        self.note = f"{why}: all hosts are on the loopback address, and no link can fail"
        self.hosts = Host(HOSTS[0], "127.0.0.1"), Host(HOSTS[1], "127.0.0.1")
        self.server = Host(SERVER, "127.0.0.1")

    def set_link(self, host: Host, *, up: bool) -> None:
        raise Unsupported("the loopback address has no cable to pull; run as root")

    def attach(self, host: Host, nic: GuestNic) -> None:
        raise Unsupported("a guest's network card needs a tap in a network namespace; run as root")

    def route_guest(self, address: str, host: Host) -> None:
        raise Unsupported("the loopback address has no router; run as root")

    def close(self) -> None:
        """Nothing was made."""


def make_network(rate: int) -> Network:
    """A network of namespaces where that can be; on the loopback address otherwise.

    :param rate: bytes per second, 0 for no limit
    """
    try:
        return NamespaceNetwork(rate)
    except Unsupported as error:
        return LoopbackNetwork(rate, str(error))


def _forward() -> None:
    """Pass packets on: a router between its links, a host to its guests."""
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1\n")
