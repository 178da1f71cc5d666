"""Which pages of a RAM block were sent, and how often: as runs for machines, as a map for people."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from sterna.analysis.ram_survey import PageSurvey

_COLUMNS = 64
_LINES = 16
_NEVER, _SOME_NEVER, _MANY = "_", "?", "+"


def page_runs(times: "NDArray[np.uint32]") -> list[list[int]]:
    """
    :param times: how often each page was sent, `shape (pages,)`
    :return: runs of pages that were sent equally often: first page, number of pages, how often; together all pages
    """
    import numpy as np

    starts = (
        np.concatenate(([0], np.flatnonzero(np.diff(times)) + 1)) if times.size else np.zeros(0, np.int64)
    )
    lengths = np.diff(starts, append=times.size)
    return [[int(at), int(size), int(times[at])] for at, size in zip(starts, lengths, strict=True)]


def show_page_maps(page_surveys: "Sequence[PageSurvey]") -> None:
    """A map of each block: one character for so many pages, the most that one of them was sent."""
    from sterna.host.printable import printable

    for block in page_surveys:
        scale = max(1, -(-block.pages // (_COLUMNS * _LINES)))
        click.echo(f"\nPages of {printable(block.name)}, {scale} to a character")
        for first in range(0, block.pages, scale * _COLUMNS):
            cells = block.times[first : first + scale * _COLUMNS]
            row = "".join(_cell(cells[at : at + scale]) for at in range(0, cells.size, scale))
            click.echo(f"{first:>9}  {row}")
    if page_surveys:
        click.echo(
            f"\n1 to 9: how often the page was sent that was sent most often; {_MANY}: more often; {_NEVER}: never; "
            f"{_SOME_NEVER}: some of the pages never"
        )


def _cell(times: "NDArray[np.uint32]") -> str:
    most = int(times.max())
    if not most:
        return _NEVER
    if not times.all():
        return _SOME_NEVER
    return str(most) if most < 10 else _MANY
