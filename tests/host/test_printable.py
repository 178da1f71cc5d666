"""Texts of others, made fit for a terminal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.host.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a plain text, größer", "a plain text, größer"),
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("a\nb\r\tc", "a\\nb\\r\\tc"),
        ("\x9b31m", "\\x9b31m"),
        ("\u202egnp.exe", "\\u202egnp.exe"),
        ("\udc80", "\\udc80"),
        ("", ""),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_lines_and_tabs_may_stay_and_a_return_to_the_line_may_not() -> None:
    assert printable("a\r\n\tb\nc\rd\x1b", lines=True) == "a\r\n\tb\nc\\rd\\x1b"


@pytest.mark.slow
@given(st.text())
def test_all_of_it_prints(text: str) -> None:
    assert printable(text).isprintable()
    kept = printable(text, lines=True)
    assert kept.replace("\r\n", "").replace("\n", "").replace("\t", "").isprintable()
