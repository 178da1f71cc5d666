"""`sterna stream`: what is in a migration stream, whether it is whole, and what differs between two."""

import json as json_module
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sterna.cli.errors import CliError, ExitCode, UsageError

if TYPE_CHECKING:
    from rich.table import Table

    from sterna.memory.digest import RamDigest
    from sterna.stream.compare import StreamDifference
    from sterna.stream.findings import SectionSurvey, StreamSurvey
    from sterna.stream.vmstate import DeviceState

_ROWS = 40
"""Most rows of a table that people see; `--json` has more."""
_WIDTH = 160
_JSON_PASSES = 10_000


@click.group("stream")
def command() -> None:
    """Read a migration stream, ours or QEMU's."""


_file = click.argument("file", type=click.Path(path_type=Path))
_channels = click.option(
    "--channel",
    "channels",
    multiple=True,
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="What a channel of multifd sent; once for each.",
)
_json = click.option("--json", is_flag=True, help="Print one JSON object.")


@command.command("info")
@_file
@_channels
@click.option("--digests", is_flag=True, help="Digest the RAM that a destination ends up with; holds it.")
@_json
def info(file: Path, channels: tuple[Path, ...], digests: bool, json: bool) -> int:
    """Show what is in the stream FILE: sections, guest RAM, passes, bytes by kind.

    FILE may be a directory that `proxy --record` wrote. Passes are derived from pages that come again.
    With --json also all fields of all devices. A broken stream is shown up to where it is broken.

    Exit code 0, or 1 when the stream cannot be read to its end.
    """
    survey = _survey(file, channels, digests=digests)
    if json:
        click.echo(json_module.dumps(_report(file, survey)))
    elif survey.configuration is not None:
        _show(file, survey)
    if survey.fault is not None:
        raise CliError(f"{_plain(str(file))}: {_plain(survey.fault.text)}")
    return ExitCode.OK


@command.command("verify")
@_file
@_channels
@_json
def verify(file: Path, channels: tuple[Path, ...], json: bool) -> int:
    """Check that the stream FILE is whole: its format, every page of guest RAM, every device.

    Exit code 0 when it is, 1 when not; then the first bad byte's section and offset are named,
    and what was expected there.
    """
    survey = _survey(file, channels)
    flaw = survey.flaw()
    if json:
        report = {"file": str(file), "ok": flaw is None, "bytes": survey.total_bytes}
        click.echo(json_module.dumps({**report, "fault": asdict(flaw) if flaw else None}))
    if flaw is not None:
        raise CliError(f"{_plain(str(file))}: {_plain(flaw.text)}")
    if not json:
        devices = [section for section in survey.sections if not section.is_ram]
        decoded = sum(section.state is not None for section in devices)
        pages = sum(block.pages for block in survey.blocks)
        records = sum(block.normal + block.zero + block.changed for block in survey.blocks)
        how = f"{decoded} decoded" if survey.described else "not decoded: the stream has no description"
        beside = f" on {len(survey.channels)} channels and the main stream" if survey.channels else ""
        click.echo(
            f"{_plain(str(file))}: ok: {survey.total_bytes} bytes{beside}, {_counted(len(survey.blocks), 'RAM block')} with "
            f"{_counted(pages, 'page')} sent {_counted(records, 'time')} in {_counted(len(survey.passes), 'pass')}, "
            f"{_counted(len(devices), 'device section')} ({how})"
        )
    return ExitCode.OK


@command.command("digest")
@click.argument("blocks", metavar="BLOCK=FILE...", nargs=-1, required=True)
@_json
def digest(blocks: tuple[str, ...], json: bool) -> int:
    """Digest RAM from files that hold a block each, as QEMU's pmemsave writes them.

    BLOCK is the block's name, such as mach-virt.ram. The digests are those of `info --digests`, of `proxy`
    and of a migration's report; that of all blocks needs all of them, in the guest's order.
    """
    from sterna.memory.digest import RamDigest, digest_file

    found = []
    for argument in blocks:
        name, equals, path = argument.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"{argument[:80]!r}: expected BLOCK=FILE, such as mach-virt.ram=memory")
        try:
            with open(path, "rb") as file:
                found.append(digest_file(name, file))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise CliError(f"{_plain(path)}: {reason}") from error
    whole = RamDigest(tuple(found))
    if json:
        click.echo(json_module.dumps(_digest_report(whole)))
    else:
        _show_digest(whole)
    return ExitCode.OK


@command.command("diff")
@click.argument("left", type=click.Path(path_type=Path))
@click.argument("right", type=click.Path(path_type=Path))
@_json
def diff(left: Path, right: Path, json: bool) -> int:
    """Show which pages of guest RAM and which fields of devices differ between the streams LEFT and RIGHT.

    Exit code 0 when none does, 1 when some do, 2 when they cannot be compared.
    """
    from sterna.stream.compare import compare

    surveys = []
    for file in (left, right):
        survey = _survey(file, digests=True, failure=ExitCode.USAGE)
        flaw = survey.fault
        if flaw is not None:
            raise CliError(f"{_plain(str(file))}: {_plain(flaw.text)}", ExitCode.USAGE)
        surveys.append(survey)
    difference = compare(*surveys)
    if json:
        report = {"left": str(left), "right": str(right), "equal": difference.equal, **asdict(difference)}
        click.echo(json_module.dumps(report))
    elif difference.equal:
        click.echo("no difference: the same guest RAM and the same device fields")
    else:
        _show_difference(left, right, difference)
    return ExitCode.OK if difference.equal else ExitCode.FAILURE


def _survey(
    file: Path,
    channels: Sequence[Path] = (),
    *,
    digests: bool = False,
    failure: ExitCode = ExitCode.FAILURE,
) -> "StreamSurvey":
    """:raise CliError: When a file cannot be read or has nothing in it."""
    from sterna.stream.capture import survey_file

    try:
        survey = survey_file(file, channels, digests=digests)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        name = error.filename if isinstance(error, OSError) and error.filename else file
        raise CliError(f"{_plain(str(name))}: {reason or error}", failure) from error
    fault = survey.fault
    if fault is not None and fault.offset == 0 and "cut short" in fault.message:
        raise CliError(f"{_plain(str(file))}: the file is empty", failure)
    return survey


def _plain(text: str) -> str:
    """Text of a stream without what a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _counted(number: int, what: str) -> str:
    plural = "es" if what.endswith("s") else "s"
    return f"{number} {what}{'' if number == 1 else plural}"


# -- for machines ---------------------------------------------------------------------------------------------


def _report(file: Path, survey: "StreamSurvey") -> dict[str, Any]:
    """What `info --json` prints."""
    configuration = survey.configuration
    return {
        "file": str(file),
        "bytes": survey.total_bytes,
        "machine": configuration.machine if configuration else None,
        "uuid": configuration.uuid.hex() if configuration and configuration.uuid else None,
        "capabilities": list(configuration.capabilities) if configuration else [],
        "page_bytes": 1 << survey.page_bits if survey.page_bits else None,
        "described": survey.described,
        "sections": [_section_report(section) for section in survey.sections],
        "ram_blocks": [asdict(block) for block in survey.blocks],
        "passes": [asdict(one) for one in survey.passes[:_JSON_PASSES]],
        "channels": [asdict(channel) for channel in survey.channels],
        "commands": [{"name": one.name, "count": one.count, "offset": one.offset} for one in survey.commands],
        "bytes_by_kind": asdict(survey.kinds),
        "ram_digest": _digest_report(survey.digest) if survey.digest else None,
        "fault": asdict(survey.fault) if survey.fault else None,
    }


def _digest_report(digest: "RamDigest") -> dict[str, Any]:
    return {"all": digest.hex, "blocks": {block.block: block.hex for block in digest.blocks}}


def _section_report(section: "SectionSurvey") -> dict[str, Any]:
    header = section.header
    return {
        "section_id": header.section_id,
        "name": header.name,
        "instance_id": header.instance_id,
        "version": header.version,
        "offset": section.offset,
        "parts": section.parts,
        "bytes": section.bytes,
        "fields": _json_value(section.state.fields) if section.state else None,
        "subsections": _subsections(section.state.subsections) if section.state else [],
    }


def _subsections(states: Iterable["DeviceState"]) -> list[dict[str, Any]]:
    return [
        {
            "name": state.name,
            "version": state.version,
            "fields": _json_value(state.fields),
            "subsections": _subsections(state.subsections),
        }
        for state in states
    ]


def _json_value(value: Any) -> Any:
    from sterna.stream.vmstate import SUBSECTIONS

    match value:
        case dict():
            return {
                name: _subsections(part) if name == SUBSECTIONS else _json_value(part)
                for name, part in value.items()
            }
        case list() | tuple():
            return [_json_value(part) for part in value]
        case bytes():
            return value.hex()
    return value


# -- for people -----------------------------------------------------------------------------------------------


def _table(title: str, columns: Sequence[str], texts: int) -> "Table":
    """:param texts: how many columns, from the left, are not numbers"""
    from rich import box
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", show_edge=False, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i < texts else "right", no_wrap=i >= texts)
    return table


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], texts: int = 1) -> None:
    import sys

    from rich.console import Console
    from rich.text import Text

    if not rows:
        return
    table = _table(title, columns, texts)
    for row in rows[:_ROWS]:
        table.add_row(*(Text(_plain(str(cell))) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _WIDTH)
    with console.capture() as shown:
        console.print(table)
    click.echo("\n" + "\n".join(line.rstrip() for line in shown.get().rstrip().splitlines()))
    if len(rows) > _ROWS:
        click.echo(f"... and {len(rows) - _ROWS} more")


def _show(file: Path, survey: "StreamSurvey") -> None:
    from sterna.monitor.units import format_size

    configuration = survey.configuration
    assert configuration is not None
    about = [f"machine {configuration.machine}", f"pages of {format_size(1 << survey.page_bits)}"]
    if configuration.uuid:
        about.append(f"UUID {configuration.uuid.hex()}")
    if configuration.capabilities:
        about.append(f"capabilities {', '.join(configuration.capabilities)}")
    if not survey.described:
        about.append("no description, so no fields")
    click.echo(_plain(f"{file}: {format_size(survey.total_bytes)}, {', '.join(about)}"))
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
    _print("Sections", ("name", "id", "version", "offset", "parts", "bytes", "fields"), sections)
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
    _print("Guest RAM", ("block", "size", "pages", "sent", *counts, "sent again", "most often"), blocks)
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
        _show_digest(survey.digest)
    _print("Passes", ("pass", "offset", *counts, "bytes"), passes, texts=0)
    kinds = [
        (name.replace("_", " "), size, f"{100 * size / survey.total_bytes:.2f} %")
        for name, size in asdict(survey.kinds).items()
        if size
    ]
    _print("Bytes by kind", ("kind", "bytes", "share"), kinds)
    columns = ("channel", "bytes", "packets", "pages", "bytes of pages", "compression")
    channels = [
        (one.id, one.bytes, one.packets, one.pages, one.page_bytes, one.compression)
        for one in survey.channels
    ]
    _print("Channels of multifd", columns, channels, texts=0)
    commands = [(one.name, f"{one.offset:#x}", one.count) for one in survey.commands]
    _print("Commands", ("command", "first at", "count"), commands)


def _show_digest(digest: "RamDigest") -> None:
    rows = [(block.block, block.size, block.hex) for block in digest.blocks]
    _print("Digests of RAM", ("block", "bytes", "digest"), [*rows, ("all of them", "", digest.hex)])


def _show_difference(left: Path, right: Path, difference: "StreamDifference") -> None:
    blocks = []
    for block in difference.blocks:
        ranges = ", ".join(f"{a}-{b}" if a != b else str(a) for a, b in block.ranges[:_ROWS])
        more = ", ..." if len(block.ranges) > _ROWS else ""
        blocks.append((block.block, block.note or ranges + more, block.pages))
    _print("Pages of guest RAM that differ", ("block", "pages", "how many"), blocks, texts=2)
    fields = [
        (
            one.section,
            one.field,
            "-" if one.left is None else one.left,
            "-" if one.right is None else one.right,
        )
        for one in difference.fields
    ]
    _print("Device fields that differ", ("section", "field", str(left), str(right)), fields, texts=4)
    if difference.field_count > len(fields):
        click.echo(f"{difference.field_count} fields differ in all")
