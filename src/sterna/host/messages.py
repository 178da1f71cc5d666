"""What msgspec says of a message that is not as it was declared, taken apart for callers who say it in words of their own."""

import re
from dataclasses import dataclass

import msgspec

_FORM = re.compile(r"(?P<reason>.*?)(?: - at `\$\.?(?P<place>[^`]*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `([^`]*)`")
_MISSING = re.compile(r"Object missing required field `([^`]*)`")
_TYPE = re.compile(r"Expected `([^`]*)`, got")


@dataclass(frozen=True)
class Flaw:
    """What is wrong with a message.

    :ivar place: the value that is wrong, ``vm.smp`` or ``check[2].limit``; empty for the whole message
    :ivar reason: msgspec's words, without the place
    :ivar unknown: a field that is not declared, with its place
    :ivar missing: a field that has to be there, with its place
    :ivar expected: the type that was declared, in msgspec's words, when another was found
    """

    place: str
    reason: str
    unknown: str | None = None
    missing: str | None = None
    expected: str | None = None


def flaw(error: msgspec.ValidationError) -> Flaw:
    """What a message was refused for."""
    form = _FORM.fullmatch(str(error))
    assert form is not None  # it matches every text
    place, reason = form["place"] or "", form["reason"]
    above = f"{place}." if place else ""
    unknown, missing, expected = (
        found[1] if (found := pattern.match(reason)) else None for pattern in (_UNKNOWN, _MISSING, _TYPE)
    )
    return Flaw(
        place,
        reason,
        None if unknown is None else above + unknown[:80],
        None if missing is None else above + missing,
        expected,
    )
