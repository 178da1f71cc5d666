"""Cables between namespaces: veth pairs with a token bucket at both ends, the routes between them, and guests' taps."""

import errno
import os
from collections.abc import Callable
from typing import Any

from sterna.launch.errors import Unsupported
from sterna.launch.host import Namespace
from sterna.testbed.errors import BedError

_HOST_END = "eth0"
_TUN = "/dev/net/tun"
_PREFIX = 24
_BURST_SECONDS = 0.002
_LEAST_BURST = 1 << 18  # a GSO packet of 64 KiB must fit, or it is cut up (tc-tbf(8), "burst")
_QUEUE_SECONDS = 0.02
_ROOT_HANDLE = 0x10000


class Link:
    """A cable from a namespace's `eth0` to the router's namespace, with addresses, a default route and a rate.

    :param name: of the router's end
    :param rate: bytes per second in each direction, 0 for no limit
    :raise BedError: When the kernel refuses; a name or an address that is in use is told.
    """

    def __init__(
        self, namespace: Namespace, router: Namespace, name: str, near: str, far: str, rate: int
    ) -> None:
        self._router = router
        self._name = name

        def make(netlink: Any) -> None:
            peer = {"ifname": name, "net_ns_fd": router.fd}
            what = f"make the interface {name}"
            _call(what, netlink.link, "add", ifname=_HOST_END, kind="veth", peer=peer)

        with_netlink(namespace, make)
        with_netlink(router, lambda netlink: _set_up(netlink, name, far, rate))

        def connect(netlink: Any) -> None:
            _set_up(netlink, _HOST_END, near, rate)
            _call(f"{name}: default route", netlink.route, "add", dst="default", gateway=far)

        with_netlink(namespace, connect)

    def set(self, *, up: bool) -> None:
        """Plug or pull it, at the router's end: the other end keeps its addresses and routes."""
        state = "up" if up else "down"

        def change(netlink: Any) -> None:
            [index] = netlink.link_lookup(ifname=self._name)
            _call(f"set the link {state}", netlink.link, "set", index=index, state=state)

        with_netlink(self._router, change)


def route(router: Namespace, address: str, gateway: str) -> None:
    """Lead one address to a gateway; a route that it had is replaced."""
    way = {"dst": f"{address}/32", "gateway": gateway}
    with_netlink(router, lambda netlink: _call(f"route {address}", netlink.route, "replace", **way))


def bring_up_loopback(namespace: Namespace) -> None:
    """In a new namespace it is down."""
    what = "bring up the loopback interface"
    with_netlink(namespace, lambda netlink: _call(what, netlink.link, "set", index=1, state="up"))


def make_tap(namespace: Namespace, name: str, mac: str, address: str, guest: str) -> None:
    """A tap device that stays until its namespace goes; whoever opens it by its name is at its other end.

    :param address: of the namespace on it
    :param guest: the one address that is led to it
    :raise BedError: When the kernel refuses.
    :raise Unsupported: When the kernel has no taps.
    """

    def make(netlink: Any) -> None:
        _call(f"make the tap {name}", netlink.link, "add", ifname=name, kind="tuntap", mode="tap")
        [index] = netlink.link_lookup(ifname=name)
        _call(f"{name}: MAC {mac}", netlink.link, "set", index=index, address=mac)
        _call(f"{name}: address {address}", netlink.addr, "add", index=index, address=address, prefixlen=32)
        _call(f"{name}: bring it up", netlink.link, "set", index=index, state="up")
        _call(f"{name}: route {guest}", netlink.route, "add", dst=f"{guest}/32", oif=index)

    if not os.path.exists(_TUN):
        raise Unsupported(f"this machine has no {_TUN} (modprobe tun)")
    with_netlink(namespace, make)


def with_netlink(namespace: Namespace, function: Callable[[Any], None]) -> None:
    """Call `function` with a netlink socket of a namespace, made on a thread that is in it."""

    def inside() -> None:
        from pyroute2 import IPRoute

        with IPRoute() as netlink:
            function(netlink)

    namespace.call(inside)


def _set_up(netlink: Any, name: str, address: str, rate: int) -> None:
    """Give an interface its address and its rate."""
    [index] = netlink.link_lookup(ifname=name)
    what = f"{name}: address {address}"
    _call(what, netlink.addr, "add", index=index, address=address, prefixlen=_PREFIX)
    _call(f"{name}: bring it up", netlink.link, "set", index=index, state="up")
    if rate:
        _limit(netlink, index, rate, name)


def _limit(netlink: Any, index: int, rate: int, name: str) -> None:
    """A token bucket (tc-tbf(8)): what waits longer than 20 ms at this rate is dropped."""
    burst = max(_LEAST_BURST, round(rate * _BURST_SECONDS))
    limit = round(rate * _QUEUE_SECONDS) + burst
    try:
        netlink.tc("add", "tbf", index, handle=_ROOT_HANDLE, rate=rate, burst=burst, limit=limit)
    except Exception as error:
        if _code(error) == errno.ENOENT:
            raise Unsupported("this kernel has no token bucket (CONFIG_NET_SCH_TBF)") from error
        raise BedError(f"{name}: cannot limit the rate to {rate} bytes/s: {error}") from error


def _call(what: str, function: Any, *arguments: Any, **options: Any) -> None:
    """
    :raise BedError: When the kernel refuses; with what was wanted and why not.
    """
    try:
        function(*arguments, **options)
    except Exception as error:
        code = _code(error)
        if code == errno.EOPNOTSUPP:
            raise Unsupported(f"{what}: this kernel cannot") from error
        reason = "it is in use already" if code == errno.EEXIST else str(error)
        raise BedError(f"cannot {what}: {reason}") from error


def _code(error: Exception) -> int:
    """The errno of a netlink error; 0 for others."""
    from pyroute2.netlink.exceptions import NetlinkError

    return int(error.code) if isinstance(error, NetlinkError) else 0
