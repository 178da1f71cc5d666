"""Texts that others have made, before a terminal or a log sees them: it would obey what is in them."""

import re

from sterna.errors import Error

_NEWLINES = re.compile(r"(\r?\n|\t)")
_TEXT_LIMIT = 400


def printable(text: str, *, lines: bool = False) -> str:
    """The text with a backslash escape for each character that does not print: control characters, those that turn the
    direction of what follows, surrogates.

    :param lines: ends of lines and tabs stay
    """
    if text.isprintable():
        return text
    if lines:
        return "".join(
            part if _NEWLINES.fullmatch(part) else printable(part) for part in _NEWLINES.split(text)
        )
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(error: BaseException) -> str:
    """An error as one line of at most 400 characters that print; a hostile peer's words may be in it.

    What this program raises itself is worded for people, and so is what the host refuses; all else is a fault of this program.
    """
    if isinstance(error, OSError):
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
    elif isinstance(error, MemoryError):
        text = f"this host has no memory left: {error}" if str(error) else "this host has no memory left"
    elif isinstance(error, Error) and str(error):
        text = str(error)
    else:
        text = f"internal error: {type(error).__name__}: {error}"
    return one_line(text)


def one_line(text: str) -> str:
    """A text that a peer may have made, as one line of at most 400 characters that print."""
    text = printable(" ".join(text.split()))
    half = _TEXT_LIMIT // 2
    return text if len(text) <= _TEXT_LIMIT else f"{text[: half - 3]} ... {text[2 - half :]}"
