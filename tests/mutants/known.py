"""Survivors that were looked at: no test can, or needs to, tell them from the sound program."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

KINDS = ("equivalent", "performance", "message")
FILE = Path(__file__).parent / "known.toml"


@dataclass(frozen=True)
class Known:
    """:ivar mutant: its name (`Point.name`)
    :ivar kind: it does the same; the same more slowly; the same but for its wording
    :ivar reason: why that is so
    """

    mutant: str
    kind: str
    reason: str


def read_known(file: Path = FILE) -> dict[str, Known]:
    """The list, by the mutants' names.

    :raise ValueError: When an entry has another kind, no reason, or is there twice.
    """
    known: dict[str, Known] = {}
    for entry in tomllib.loads(file.read_text()).get("known", []):
        one = Known(**entry)
        if one.kind not in KINDS or not one.reason.strip() or one.mutant in known:
            raise ValueError(
                f"{file.name}: {one.mutant}: there twice, of no kind in {', '.join(KINDS)}, or no reason"
            )
        known[one.mutant] = one
    return known
