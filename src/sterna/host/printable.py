"""Texts that others have made, before a terminal or a log sees them: it would obey what is in them."""

import re

_NEWLINES = re.compile(r"(\r?\n|\t)")


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
