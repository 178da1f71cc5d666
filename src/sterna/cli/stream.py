"""`sterna stream`: what is in a migration stream, whether it is whole, and what differs between two."""

import json as json_module
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sterna.cli import proxy
from sterna.cli.errors import CliError, ExitCode, UsageError
from sterna.cli.pagemap import show_page_maps
from sterna.cli.paths import NamedPath
from sterna.cli.streamreport import (
    digest_report,
    show_difference,
    show_digest,
    show_survey,
    survey_report,
    to_json,
)
from sterna.host.printable import printable
from sterna.host.units import counted

if TYPE_CHECKING:
    from sterna.analysis.findings import StreamFault, StreamSurvey


@click.group("stream")
def command() -> None:
    """Read a migration stream, ours or QEMU's."""


command.add_command(proxy.command)
_file = click.argument("file", type=NamedPath(path_type=Path))
_channels = click.option(
    "--channel",
    "channels",
    multiple=True,
    metavar="FILE",
    type=NamedPath(path_type=Path),
    help="What a channel of multifd sent; once for each.",
)
_json = click.option("--json", is_flag=True, help="Print one JSON object.")


@command.command("info")
@_file
@_channels
@click.option("--digests", is_flag=True, help="Digest the RAM that a destination ends up with; holds it.")
@click.option("--pages", is_flag=True, help="Map each RAM block: how often each of its pages was sent.")
@_json
def info(file: Path, channels: tuple[Path, ...], digests: bool, pages: bool, json: bool) -> int:
    """Show what is in the stream FILE: sections, guest RAM, passes, bytes by kind.

    FILE may be a directory that `proxy --record` wrote. Passes are derived from pages that come again.
    With --json also all fields of all devices, and with --pages runs of pages that were sent equally
    often. A broken stream is shown up to where it is broken.

    \b
    Exit codes: 0 read to its end, 1 broken, 2 wrong call, or no file that can be read,
    7 something is in it that cannot be read here.
    """
    survey = _survey(file, channels, digests=digests)
    if json:
        click.echo(to_json({"file": str(file), **survey_report(survey, pages=pages)}))
    elif survey.configuration is not None:
        show_survey(str(file), survey)
        if pages:
            show_page_maps(survey.page_surveys)
    if survey.fault is not None:
        raise _failure(file, survey, survey.fault)
    return ExitCode.OK


@command.command("verify")
@_file
@_channels
@_json
def verify(file: Path, channels: tuple[Path, ...], json: bool) -> int:
    """Check that the stream FILE is whole: its format, every page of guest RAM, every device.

    When it is not, the first bad byte's section and offset are named, and what was expected there.

    \b
    Exit codes: 0 whole, 1 not whole, 2 wrong call, or no file that can be read,
    7 something is in it that cannot be read here: whether it is whole cannot be told.
    """
    survey = _survey(file, channels)
    flaw = survey.flaw()
    if json:
        ok = None if flaw is not None and flaw.unsupported else flaw is None
        report = {"file": str(file), "ok": ok, "bytes": survey.total_bytes}
        click.echo(json_module.dumps({**report, "fault": asdict(flaw) if flaw else None}))
    if flaw is not None:
        raise _failure(file, survey, flaw)
    if not json:
        devices = [section for section in survey.sections if not section.is_ram]
        decoded = sum(section.state is not None for section in devices)
        pages = sum(block.pages for block in survey.blocks)
        records = sum(block.normal + block.zero + block.changed for block in survey.blocks)
        how = f"{decoded} decoded" if survey.described else "not decoded: the stream has no description"
        beside = f" on {len(survey.channels)} channels and the main stream" if survey.channels else ""
        click.echo(
            f"{printable(str(file))}: ok: {survey.total_bytes} bytes{beside}, {counted(len(survey.blocks), 'RAM block')} with "
            f"{counted(pages, 'page')} sent {counted(records, 'time')} in {counted(len(survey.passes), 'pass')}, "
            f"{counted(len(devices), 'device section')} ({how})"
        )
    return ExitCode.OK


@command.command("digest")
@click.argument("blocks", metavar="BLOCK=FILE...", nargs=-1, required=True)
@_json
def digest(blocks: tuple[str, ...], json: bool) -> int:
    """Digest RAM from files that hold a block each, as QEMU's pmemsave writes them.

    BLOCK is the block's name, such as mach-virt.ram; FILE holds all of it. The digests are those of `info --digests`, of `proxy`
    and of a migration's report; that of all blocks needs all of them, in the guest's order.
    """
    from sterna.memory.digest import BlockDigest, RamDigest, digest_file

    found: list[BlockDigest] = []
    for argument in blocks:
        name, equals, path = argument.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"{argument[:80]!r}: expected BLOCK=FILE, such as mach-virt.ram=memory")
        if any(one.block == name for one in found):
            raise UsageError(f"{argument[:80]!r}: block {name[:80]!r} is given twice; each has one file")
        try:
            with open(path, "rb") as file:
                found.append(digest_file(name, file))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"{printable(path)}: {reason}") from error
    whole = RamDigest(tuple(found))
    if json:
        click.echo(json_module.dumps(digest_report(whole)))
    else:
        show_digest(whole)
    return ExitCode.OK


@command.command("diff")
@click.argument("left", type=NamedPath(path_type=Path))
@click.argument("right", type=NamedPath(path_type=Path))
@_json
def diff(left: Path, right: Path, json: bool) -> int:
    """Show which pages of guest RAM and which fields of devices differ between the streams LEFT and RIGHT.

    Exit code 0 when none does, 1 when some do, 2 when they cannot be compared: one is broken,
    7 when something is in one that cannot be read here.
    """
    from sterna.analysis.compare import compare

    surveys = []
    for file in (left, right):
        survey = _survey(file, page_digests=True)
        if survey.fault is not None:
            raise _failure(file, survey, survey.fault, broken=ExitCode.USAGE)
        surveys.append(survey)
    difference = compare(*surveys)
    if json:
        report = {"left": str(left), "right": str(right), "equal": difference.equal, **asdict(difference)}
        click.echo(json_module.dumps(report))
    elif difference.equal:
        click.echo("no difference: the same guest RAM and the same device fields")
    else:
        show_difference(left, right, difference)
    return ExitCode.OK if difference.equal else ExitCode.FAILURE


def _survey(
    file: Path,
    channels: Sequence[Path] = (),
    *,
    digests: bool = False,
    page_digests: bool = False,
) -> "StreamSurvey":
    """:raise UsageError: When a file cannot be read."""
    from sterna.analysis.capture import survey_file
    from sterna.cli.kernels import prepare_survey_kernels

    prepare_survey_kernels()
    try:
        survey = survey_file(file, channels, digests=digests, page_digests=page_digests)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        name = error.filename if isinstance(error, OSError) and error.filename else file
        raise UsageError(f"{printable(str(name))}: {reason or error}") from error
    return survey


def _failure(
    file: Path, survey: "StreamSurvey", fault: "StreamFault", broken: ExitCode = ExitCode.FAILURE
) -> CliError:
    text = "the file is empty" if fault.cut and not survey.bytes else printable(fault.text)
    return CliError(f"{printable(str(file))}: {text}", ExitCode.UNSUPPORTED if fault.unsupported else broken)
