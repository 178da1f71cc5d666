"""Tables of figures that fit a terminal: columns that have no room beside the others come below them."""

from collections.abc import Iterator, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

_ANY_WIDTH = 10_000


def print_table(
    console: Console, titles: Sequence[str], sections: Sequence[Sequence[Sequence[str]]], *, labels: int = 1
) -> None:
    """Print rows of cells under their titles, in as many tables as the console's width takes. Nothing is cut.

    :param sections: groups of rows, with a line between groups
    :param labels: how many of the first columns say what a row is of: each table has them, and where they would take more
        than half of the width they are wrapped
    """
    names = _table(titles, sections, range(labels))
    wrapped = _width(console, names) > console.width // 2
    for columns in _bands(console, titles, sections, labels, wrapped):
        console.print(_table(titles, sections, [*range(labels), *columns], labels))


def _bands(
    console: Console,
    titles: Sequence[str],
    sections: Sequence[Sequence[Sequence[str]]],
    labels: int,
    wrapped: bool,
) -> Iterator[list[int]]:
    """Which columns each table has besides the labels: as many as fit, and one at least."""
    band: list[int] = []
    for column in range(labels, len(titles)):
        wider = _table(titles, sections, [*range(labels), *band, column], labels)
        if band and _width(console, wider, wrapped) > console.width:
            yield band
            band = []
        band.append(column)
    yield band


def _table(
    titles: Sequence[str],
    sections: Sequence[Sequence[Sequence[str]]],
    columns: Sequence[int],
    labels: int = 0,
) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        if column < labels:
            table.add_column(titles[column], overflow="fold")
        else:
            table.add_column(titles[column], justify="right", no_wrap=True)
    for rows in sections:
        for row in rows:
            table.add_row(*(row[column] for column in columns))
        table.add_section()
    return table


def _width(console: Console, table: Table, wrapped: bool = False) -> int:
    measured = console.measure(table, options=console.options.update(width=_ANY_WIDTH))
    return measured.minimum if wrapped else measured.maximum
