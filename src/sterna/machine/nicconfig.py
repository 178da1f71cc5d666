"""What a user says of a network card, in QEMU's words: ``tap,ifname=tap0,mac=52:54:00:12:34:56``."""

import re
from dataclasses import dataclass

from sterna.machine.errors import MachineError

_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}", re.ASCII)
_NAME = re.compile(r"[^\s/:,%]{1,15}")
_FD = re.compile(r"[0-9]{1,7}", re.ASCII)
_FIRST_MAC = 0x5254_0012_3456
_MULTICAST = 1
_EXAMPLE = "tap,ifname=tap0,mac=52:54:00:12:34:56"
_KEYS = ("ifname", "fd", "mac", "model", "script", "downscript")
_FIXED = {"model": ("virtio-net-device", "virtio"), "script": ("no",), "downscript": ("no",)}
"""Keys that QEMU's users write, and the values that describe what is always so here."""


class NicConfigError(MachineError):
    """A card is not described right; the text names what is wrong and what is allowed."""


@dataclass(frozen=True)
class NicConfig:
    """A network card on a tap.

    :ivar ifname: name of the tap; empty when `fd` says which
    :ivar fd: descriptor of an open tap, or None
    :ivar mac: 6 bytes, or None for the one that goes with the card's number
    """

    ifname: str = ""
    fd: int | None = None
    mac: bytes | None = None

    @property
    def tap(self) -> str:
        """Which tap, for people."""
        return self.ifname or f"fd {self.fd}"


def default_mac(number: int) -> bytes:
    """The address of card `number`, counted from 0: QEMU's."""
    return (_FIRST_MAC + number).to_bytes(6, "big")


def parse_nic(text: str) -> NicConfig | None:
    """
    :return: None for ``none``
    :raise NicConfigError: When the text describes no card.
    """
    kind, *options = text.split(",")
    if kind == "none" and not options:
        return None
    if kind != "tap":
        raise NicConfigError(f"nic: {kind[:40]!r} is not known; write none, or a tap such as {_EXAMPLE}")
    found: dict[str, str] = {}
    for option in options:
        key, separator, value = option.partition("=")
        if not separator or key not in _KEYS:
            raise NicConfigError(
                f"nic: {option[:40]!r} is not known; there are {', '.join(_KEYS)}, each with ="
            )
        if key in found:
            raise NicConfigError(f"nic: {key} is given twice")
        if key in _FIXED and value not in _FIXED[key]:
            raise NicConfigError(f"nic: {key}={value[:40]} is not possible; only {key}={_FIXED[key][0]} is")
        found[key] = value
    if ("ifname" in found) == ("fd" in found):
        raise NicConfigError(f"nic: say which tap, by ifname or by fd: {_EXAMPLE}")
    if "ifname" in found and not _NAME.fullmatch(found["ifname"]):
        raise NicConfigError(
            f"nic: {found['ifname'][:40]!r} cannot be an interface's name (1 to 15 characters)"
        )
    if "fd" in found and not _FD.fullmatch(found["fd"]):
        raise NicConfigError(f"nic: fd={found['fd'][:40]} is not a number of a descriptor")
    fd = int(found["fd"]) if "fd" in found else None
    return NicConfig(found.get("ifname", ""), fd, _parse_mac(found["mac"]) if "mac" in found else None)


def _parse_mac(text: str) -> bytes:
    if not _MAC.fullmatch(text):
        raise NicConfigError(f"nic: mac={text[:40]} is not six hexadecimal bytes, such as 52:54:00:12:34:56")
    mac = bytes.fromhex(text.replace(":", ""))
    if mac[0] & _MULTICAST or not any(mac):
        raise NicConfigError(f"nic: mac={text} cannot be a card's: it is a group's, or all zeros")
    return mac
