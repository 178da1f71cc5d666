"""Cables between namespaces: veth pairs with a token bucket at both ends, and the router they end in."""

import errno
from typing import Any

from sterna.testbed.errors import BedError, Unsupported
from sterna.testbed.namespace import Namespace

_HOST_END = "eth0"
_PREFIX = 24
_BURST_SECONDS = 0.002
_LEAST_BURST = 1 << 18  # a GSO packet of 64 KiB must fit, or it is cut up (tc-tbf(8), "burst")
_QUEUE_SECONDS = 0.02
_ROOT_HANDLE = 0x10000


class LinkError(BedError):
    """The kernel refuses an interface, an address or a queue."""


class Router:
    """The namespace that all links end in."""

    def __init__(self, namespace: Namespace) -> None:
        self.namespace = namespace
        self.netlink = _netlink(namespace)
        _call("bring up the router's loopback", self.netlink.link, "set", index=1, state="up")

    def route(self, address: str, gateway: str) -> None:
        """Lead one address to a gateway; a route that it had is replaced."""
        _call(f"route {address}", self.netlink.route, "replace", dst=f"{address}/32", gateway=gateway)

    def close(self) -> None:
        self.netlink.close()


class Link:
    """A cable from a namespace's `eth0` to the router, with addresses, a default route and a rate.

    :param name: of the router's end
    :param rate: bytes per second in each direction, 0 for no limit
    :raise LinkError: When the kernel refuses; a name or an address that is in use is told.
    """

    def __init__(
        self, namespace: Namespace, router: Router, name: str, near: str, far: str, rate: int
    ) -> None:
        self._router = router
        self._netlink = _netlink(namespace)
        try:
            peer = {"ifname": name, "net_ns_fd": router.namespace.fd}
            _call(
                f"make the interface {name}",
                self._netlink.link,
                "add",
                ifname=_HOST_END,
                kind="veth",
                peer=peer,
            )
            [self._near] = self._netlink.link_lookup(ifname=_HOST_END)
            [self._far] = router.netlink.link_lookup(ifname=name)
            _call(f"{name}: loopback", self._netlink.link, "set", index=1, state="up")
            for netlink, index, address in (
                (self._netlink, self._near, near),
                (router.netlink, self._far, far),
            ):
                what = f"{name}: address {address}"
                _call(what, netlink.addr, "add", index=index, address=address, prefixlen=_PREFIX)
                _call(f"{name}: bring it up", netlink.link, "set", index=index, state="up")
                if rate:
                    _limit(netlink, index, rate, name)
            _call(f"{name}: default route", self._netlink.route, "add", dst="default", gateway=far)
        except BaseException:
            self._netlink.close()
            raise

    def set(self, *, up: bool) -> None:
        """Plug or pull it, at the router's end: the other end keeps its addresses and routes."""
        state = "up" if up else "down"
        _call(f"set the link {state}", self._router.netlink.link, "set", index=self._far, state=state)

    def close(self) -> None:
        self._netlink.close()


def _limit(netlink: Any, index: int, rate: int, name: str) -> None:
    """A token bucket (tc-tbf(8)): what waits longer than 20 ms at this rate is dropped."""
    burst = max(_LEAST_BURST, round(rate * _BURST_SECONDS))
    limit = round(rate * _QUEUE_SECONDS) + burst
    try:
        netlink.tc("add", "tbf", index, handle=_ROOT_HANDLE, rate=rate, burst=burst, limit=limit)
    except Exception as error:
        if _code(error) == errno.ENOENT:
            raise Unsupported("this kernel has no token bucket (CONFIG_NET_SCH_TBF)") from error
        raise LinkError(f"{name}: cannot limit the rate to {rate} bytes/s: {error}") from error


def _netlink(namespace: Namespace) -> Any:
    from pyroute2 import IPRoute

    return IPRoute(netns=f"/proc/self/fd/{namespace.fd}", flags=0)


def _call(what: str, function: Any, *arguments: Any, **options: Any) -> None:
    """
    :raise LinkError: When the kernel refuses; with what was wanted and why not.
    """
    try:
        function(*arguments, **options)
    except Exception as error:
        code = _code(error)
        if code == errno.EOPNOTSUPP:
            raise Unsupported(f"{what}: this kernel cannot") from error
        reason = "it is in use already" if code == errno.EEXIST else str(error)
        raise LinkError(f"cannot {what}: {reason}") from error


def _code(error: Exception) -> int:
    """The errno of a netlink error; 0 for others."""
    from pyroute2.netlink.exceptions import NetlinkError

    return int(error.code) if isinstance(error, NetlinkError) else 0
