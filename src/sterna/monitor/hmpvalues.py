"""Migration parameters and capabilities as people write them, refused in QEMU's words."""

from typing import Any

from sterna.host.units import parse_size
from sterna.migration.parameters import PARAMETERS
from sterna.monitor.protocol import QmpError

_ON, _OFF = ("on", "true", "yes", "y"), ("off", "false", "no", "n")


def parse_switch(name: str, text: str) -> bool:
    """Whether something is to be on.

    :raise QmpError: When the text does not say that.
    """
    if text not in (*_ON, *_OFF):
        raise QmpError(f"Parameter '{name}' expects 'on' or 'off'")
    return text in _ON


def parse_parameter(name: str, text: str, default_unit: str = "m") -> Any:
    """A migration parameter's value from text, of the type the parameter has.

    :param default_unit: what a bare number for `max-bandwidth` counts: MiB/s in QEMU's human monitor
    :raise QmpError: When the text does not fit, or the parameter is unknown.
    """
    spec = PARAMETERS.get(name)
    if spec is None:
        raise QmpError(f"invalid parameter value: {name[:80]}")
    if isinstance(spec.default, bool):
        return parse_switch(name, text)
    if isinstance(spec.default, str):
        return text
    if name in ("max-bandwidth", "max-postcopy-bandwidth", "xbzrle-cache-size"):
        try:
            return parse_size(text, default_unit if name == "max-bandwidth" else "")
        except ValueError as error:
            raise QmpError(f"Invalid size {text[:40]}") from error
    if not text.isascii() or not text.removeprefix("-").isdigit() or len(text) > 20:
        raise QmpError(f"Parameter '{name}' expects an integer")
    return int(text)
