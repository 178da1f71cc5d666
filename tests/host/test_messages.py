"""msgspec's errors, taken apart: whatever its version says, all that callers reword is found in it."""

from typing import Annotated, Any

import msgspec
import pytest

from sterna.host.messages import Flaw, flaw


class Inner(msgspec.Struct, forbid_unknown_fields=True):
    size: Annotated[int, msgspec.Meta(ge=1)]
    name: str | None = None


class Outer(msgspec.Struct, forbid_unknown_fields=True):
    inner: Inner
    many: list[Inner] = []


@pytest.mark.parametrize(
    ("message", "kind", "found"),
    [
        (7, Outer, Flaw("", "Expected `object`, got `int`", expected="object")),
        ({}, Outer, Flaw("", "Object missing required field `inner`", missing="inner")),
        (
            {"inner": {}},
            Outer,
            Flaw("inner", "Object missing required field `size`", missing="inner.size"),
        ),
        (
            {"inner": {"size": 1, "x": 2}},
            Outer,
            Flaw("inner", "Object contains unknown field `x`", unknown="inner.x"),
        ),
        (
            {"inner": {"size": "1"}},
            Outer,
            Flaw("inner.size", "Expected `int`, got `str`", expected="int"),
        ),
        (
            {"inner": {"size": 1, "name": 2}},
            Outer,
            Flaw("inner.name", "Expected `str | null`, got `int`", expected="str | null"),
        ),
        ({"inner": {"size": 0}}, Outer, Flaw("inner.size", "Expected `int` >= 1")),
        (
            {"inner": {"size": 1}, "many": [{"size": 1}, {}]},
            Outer,
            Flaw("many[1]", "Object missing required field `size`", missing="many[1].size"),
        ),
        ([0], list[str], Flaw("[0]", "Expected `str`, got `int`", expected="str")),
        ({"": 1}, Inner, Flaw("", "Object contains unknown field ``", unknown="")),
    ],
)
def test_what_is_wrong_with_a_message(message: Any, kind: type, found: Flaw) -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert(message, kind)
    assert flaw(caught.value) == found


def test_the_name_of_an_unknown_field_is_cut() -> None:
    with pytest.raises(msgspec.ValidationError) as caught:
        msgspec.convert({"x" * 500: 1}, Inner)
    assert flaw(caught.value).unknown == "x" * 80
