"""What a survey of a stream found, as JSON and as tables."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sterna.cli.pagemap import page_runs
from sterna.host.printable import printable

if TYPE_CHECKING:
    from sterna.analysis.compare import StreamDifference
    from sterna.analysis.findings import SectionSurvey, StreamSurvey
    from sterna.memory.digest import RamDigest

_ROWS = 40
"""Most rows of a table that people see; `--json` has more."""
_WIDTH = 160
_JSON_PASSES = 10_000


# -- for machines ---------------------------------------------------------------------------------------------


def survey_report(survey: "StreamSurvey", *, pages: bool = False) -> dict[str, Any]:
    """A survey for machines; `to_json` makes text of it.

    :param pages: whether to say of each page how often it was sent
    """
    configuration = survey.configuration
    maps = {block.name: {"page_runs": page_runs(block.times)} for block in survey.page_surveys if pages}
    return {
        "bytes": survey.total_bytes,
        "machine": configuration.machine if configuration else None,
        "uuid": configuration.uuid.hex() if configuration and configuration.uuid else None,
        "capabilities": list(configuration.capabilities) if configuration else [],
        "page_bytes": 1 << survey.page_bits if survey.page_bits else None,
        "described": survey.described,
        "sections": [_section_report(section) for section in survey.sections],
        "ram_blocks": [asdict(block) | maps.get(block.name, {}) for block in survey.blocks],
        "passes": [asdict(one) for one in survey.passes[:_JSON_PASSES]],
        "channels": [asdict(channel) for channel in survey.channels],
        "commands": [{"name": one.name, "count": one.count, "offset": one.offset} for one in survey.commands],
        "bytes_by_kind": asdict(survey.kinds),
        "ram_digest": digest_report(survey.digest) if survey.digest else None,
        "fault": asdict(survey.fault) if survey.fault else None,
    }


def digest_report(digest: "RamDigest") -> dict[str, Any]:
    return {"all": digest.hex, "blocks": {block.block: block.hex for block in digest.blocks}}


def _section_report(section: "SectionSurvey") -> dict[str, Any]:
    return {
        **asdict(section.header),
        "offset": section.offset,
        "parts": section.parts,
        "bytes": section.bytes,
        "fields": section.state.fields if section.state else None,
        "subsections": section.state.subsections if section.state else [],
    }


def to_json(report: Mapping[str, Any]) -> str:
    """A report as text, with the bytes and the states of devices that are in it."""
    return json.dumps(report, default=_plain)


def _plain(value: object) -> object:
    from sterna.stream.vmstate import DeviceState

    if isinstance(value, DeviceState):
        return {name: getattr(value, name) for name in ("name", "version", "fields", "subsections")}
    assert isinstance(value, bytes)
    return value.hex()


# -- for people -----------------------------------------------------------------------------------------------


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> None:
    """:param texts: how many columns, from the left, are not numbers"""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not rows:
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right", no_wrap=i >= texts)
    for row in rows[:_ROWS]:
        table.add_row(*(Text(printable(str(cell))) for cell in row))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as shown:
        console.print(table)
    click.echo("\n" + "\n".join(line.rstrip() for line in shown.get().rstrip().splitlines()))
    if len(rows) > _ROWS:
        click.echo(f"... and {len(rows) - _ROWS} more")


def show_survey(title: str, survey: "StreamSurvey") -> None:
    from sterna.host.units import format_size

    configuration = survey.configuration
    assert configuration is not None
    about = [f"machine {configuration.machine}", f"pages of {format_size(1 << survey.page_bits)}"]
    if configuration.uuid:
        about.append(f"UUID {configuration.uuid.hex()}")
    if configuration.capabilities:
        about.append(f"capabilities {', '.join(configuration.capabilities)}")
    if not survey.described:
        about.append("no description, so no fields")
    click.echo(printable(f"{title}: {format_size(survey.total_bytes)}, {', '.join(about)}"))
    sections = [
        (
            str(section.header),
            section.header.section_id,
            section.header.version,
            f"{section.offset:#x}",
            section.parts,
            section.bytes,
            "" if section.state is None else len(section.state.fields),
        )
        for section in survey.sections
    ]
    print_table("Sections", ("name", "id", "version", "offset", "parts", "bytes", "fields"), sections)
    changes = any(block.changed for block in survey.blocks)
    blocks = [
        (
            block.name,
            format_size(block.bytes),
            block.pages,
            block.sent,
            block.normal,
            block.zero,
            *([block.changed] if changes else []),
            block.repeated,
            block.most,
        )
        for block in survey.blocks
    ]
    counts = ("full records", "zero records", *(["changes"] if changes else []))
    print_table("Guest RAM", ("block", "size", "pages", "sent", *counts, "sent again", "most often"), blocks)
    passes = [
        (
            one.number,
            f"{one.offset:#x}",
            one.normal,
            one.zero,
            *([one.changed] if changes else []),
            one.bytes,
        )
        for one in survey.passes
    ]
    if survey.digest:
        show_digest(survey.digest)
    print_table("Passes", ("pass", "offset", *counts, "bytes"), passes, texts=0)
    kinds = [
        (name.replace("_", " "), size, f"{100 * size / survey.total_bytes:.2f} %")
        for name, size in asdict(survey.kinds).items()
        if size
    ]
    print_table("Bytes by kind", ("kind", "bytes", "share"), kinds)
    columns = ("channel", "bytes", "packets", "pages", "bytes of pages", "compression")
    channels = [
        (one.id, one.bytes, one.packets, one.pages, one.page_bytes, one.compression)
        for one in survey.channels
    ]
    print_table("Channels of multifd", columns, channels, texts=0)
    commands = [(one.name, f"{one.offset:#x}", one.count) for one in survey.commands]
    print_table("Commands", ("command", "first at", "count"), commands)


def show_digest(digest: "RamDigest") -> None:
    rows = [(block.block, block.size, block.hex) for block in digest.blocks]
    print_table("Digests of RAM", ("block", "bytes", "digest"), [*rows, ("all of them", "", digest.hex)])


def show_difference(left: Path, right: Path, difference: "StreamDifference") -> None:
    blocks = []
    for block in difference.blocks:
        ranges = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in block.ranges[:_ROWS])
        more = ", ..." if len(block.ranges) > _ROWS else ""
        blocks.append((block.block, block.note or ranges + more, block.pages))
    print_table("Pages of guest RAM that differ", ("block", "pages", "how many"), blocks, texts=2)
    fields = [
        (
            one.section,
            one.field,
            "-" if one.left is None else one.left,
            "-" if one.right is None else one.right,
        )
        for one in difference.fields
    ]
    print_table("Device fields that differ", ("section", "field", str(left), str(right)), fields, texts=4)
    if difference.field_count > len(fields):
        click.echo(f"{difference.field_count} fields differ in all")
