"""`sterna testbed run`, `list` and `clean`."""

import json as json_module
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sterna.cli.errors import ExitCode, UsageError, write_file
from sterna.cli.paths import NamedPath
from sterna.host.newfile import check_report
from sterna.host.printable import printable
from sterna.launch.signals import ENDING, ended_in_order
from sterna.testbed.kinds import VM_KINDS

if TYPE_CHECKING:
    from sterna.testbed.kind import VmKind
    from sterna.testbed.runner import Result

_FILE = NamedPath(path_type=Path, dir_okay=False)
_MARKS = {"passed": "green", "failed": "red", "skipped": "yellow", "error": "red"}


@click.command("list")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def list_scenarios(json: bool) -> int:
    """Explain the scenarios."""
    from sterna.testbed import scenario

    found = [(file.name, file.scenario("emulated")) for file in scenario.find_all("all")]
    if json:
        report = [
            {"name": name, "title": one.title, "checks": {check.kind: check.claim for check in one.check}}
            for name, one in found
        ]
        click.echo(json_module.dumps({"scenarios": report}))
        return ExitCode.OK
    for name, one in found:
        click.echo(f"{name:<10} {one.title}")
        for check in one.check:
            click.echo(f"{'':<10}   {check.kind:<11} {check.claim}")
    click.echo(f"{'seed':<10} {', '.join(name for name, _ in found if name in scenario.SEED)}")
    click.echo(f"{'all':<10} all of them")
    return ExitCode.OK


@click.command("clean")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def clean(json: bool) -> int:
    """Remove what killed runs have left: files, swap files, memory groups.

    `run` does so itself before it begins. Processes and networks never outlive the run that made them.
    """
    from sterna.testbed.journal import clean_stale

    removed = clean_stale(say=_say)
    if json:
        click.echo(json_module.dumps({"removed": removed}))
        return ExitCode.OK
    for line in removed:
        click.echo(f"removed {line}")
    if not removed:
        click.echo("nothing was left behind")
    return ExitCode.OK


@click.command("run")
@click.argument("names", metavar="SCENARIO...", nargs=-1, required=True)
@click.option(
    "--vm",
    "kind",
    type=click.Choice(list(VM_KINDS)),
    default="emulated",
    show_default=True,
    help="The VM under test: sterna on the emulated CPU (board virt or Versatile Express) or on KVM, QEMU with "
    "sterna's guests, or QEMU with ARM Linux.",
)
@click.option("--qemu", type=NamedPath(), metavar="PATH", help="The QEMU under test; else qemu-system-arm.")
@click.option("--vm-arguments", default="", metavar="TEXT", help="More arguments for every VM.")
@click.option("--audit", is_flag=True, help="Audit every harvest of the dirty log, in all scenarios.")
@click.option(
    "--breakage",
    default="",
    metavar="BREAKAGE",
    help="Give the emulated hypervisor a fault, to see that the checks find it; a name that is none lists them.",
)
@click.option("--reduced", is_flag=True, help="Small guests, few repetitions.")
@click.option("--json", is_flag=True, help="Print one JSON object, with all that was seen.")
@click.option("--html", type=_FILE, metavar="FILE", help="Write a page with all figures and plots to FILE.")
@click.option("--junit", type=_FILE, metavar="FILE", help="Write JUnit XML to FILE.")
def run(
    names: tuple[str, ...],
    kind: str,
    qemu: str | None,
    vm_arguments: str,
    audit: bool,
    breakage: str,
    reduced: bool,
    json: bool,
    html: Path | None,
    junit: Path | None,
) -> int:
    """Run scenarios: their names, paths of files of your own, `seed` for those of the document that sterna comes from,
    or `all` that ship.

    As root the hosts are network namespaces with links of a limited rate; else all are on the loopback address.
    Nothing is left behind, however a run ends.

    Exit code: 0 all checks held, 5 one did not, else 1 where a scenario could not be run to its end, 7 where this
    machine can run none of them.
    """
    from sterna.launch.errors import LaunchError
    from sterna.launch.qemu import find_qemu
    from sterna.testbed import scenario
    from sterna.testbed.errors import ScenarioError
    from sterna.testbed.journal import clean_stale
    from sterna.testbed.kind import KindOptions
    from sterna.testbed.runner import run_scenario

    if qemu is not None and not kind.startswith("qemu"):
        raise UsageError("--qemu goes with --vm qemu and qemu-linux")
    if qemu is not None:
        try:
            find_qemu(qemu)
        except LaunchError as error:
            raise UsageError(f"--qemu: {error}") from error
    if breakage:
        _check_breakage(breakage, kind)
    try:
        options = KindOptions(qemu, tuple(shlex.split(vm_arguments)), breakage)
    except ValueError as error:
        raise UsageError(f"--vm-arguments {vm_arguments[:80]!r}: {str(error).lower()}") from error
    try:
        files = [file for name in names for file in scenario.find_all(name)]
    except ScenarioError as error:
        raise UsageError(str(error)) from error
    for option, path in (("--html", html), ("--junit", junit)):
        if path is not None:
            try:
                check_report(path)
            except OSError as error:
                raise UsageError(f"{option}: cannot write {path}: {error.strerror}") from error
    results: list[Result] = []
    began, began_at = time.monotonic(), time.time()
    with ended_in_order(*ENDING):
        try:
            for line in clean_stale(say=_say):
                _say(f"removed what an earlier run left: {line}")
            vm = VM_KINDS.get(kind)(options)
            _prepare(vm)
            for file in files:
                say = (lambda text: None) if json else partial(_say, who=f"  {file.name}")
                result = run_scenario(file, vm, say, reduced=reduced, audit=audit)
                results.append(result)
                if not json:
                    _show(result)
        except ScenarioError as error:
            raise UsageError(str(error)) from error
    if json:
        from sterna.testbed.results import to_json

        click.echo(to_json(results))
    else:
        _summarise(results, time.monotonic() - began)
    if junit is not None:
        from sterna.testbed.results import to_junit

        write_file(junit, to_junit(results))
    if html is not None:
        from sterna.report.page import Run, render

        page = render(results, Run(began_at, time.monotonic() - began, reduced))
        # A figure may hold what a VM said: bytes that were no text.
        write_file(html, page.encode("utf-8", "replace"))
    return _exit_code(results)


def _check_breakage(breakage: str, kind: str) -> None:
    if kind != "emulated":
        raise UsageError(
            f"--breakage goes with --vm emulated, whose hypervisor has the faults; not with {kind}"
        )
    from sterna.testing.breakages import BREAKAGES

    if breakage not in BREAKAGES:
        raise UsageError(f"--breakage: no breakage {breakage[:80]!r}; there are {', '.join(BREAKAGES)}")


def _prepare(kind: "VmKind") -> None:
    """Have kernels compiled before anything is timed."""
    from sterna.cli.kernels import compile_kernels, prepare_survey_kernels

    if kind.accel:
        compile_kernels(kind.accel)
    else:
        prepare_survey_kernels()  # for what is forwarded


# -- for people -----------------------------------------------------------------------------------------------


def _say(text: str, who: str = "sterna") -> None:
    print(f"{who}: {_shown(text)}", file=sys.stderr, flush=True)


def _shown(text: str) -> str:
    """A text that may hold what a guest or a VM said."""
    return printable(text, lines=True)


def _show(result: "Result") -> None:
    """One line for each claim, with what was measured."""
    name, outcome = result.scenario, result.outcome.value
    click.echo(f"{_mark(outcome)} {name:<10} {_shown(result.title)} ({result.seconds:.1f} s)")
    if result.reason and not result.findings:
        click.echo(f"{'':<8} {_shown(result.reason)}")
    elif result.reason and outcome == "error":
        click.echo(f"{'':<8} it broke off: {_shown(result.reason)}")
    for finding in result.findings:
        click.echo(f"{'':<8} {_mark(finding.verdict.value)} {_shown(f'{finding.claim}: {finding.figure}')}")
        for problem in finding.problems:
            click.echo(f"{'':<17} - {_shown(problem)}")


def _summarise(results: "Sequence[Result]", seconds: float) -> None:
    counts = Counter(result.outcome.value for result in results)
    told = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    checks = sum(len(result.findings) for result in results)
    click.echo(f"{len(results)} scenarios, {checks} checks in {seconds:.0f} s: {told}")
    for note in dict.fromkeys(result.note for result in results if result.note):
        click.echo(_shown(note))


def _mark(outcome: str) -> str:
    return click.style(f"{outcome.upper():<8}", fg=_MARKS[outcome])


def _exit_code(results: "Sequence[Result]") -> ExitCode:
    outcomes = {result.outcome.value for result in results}
    if "failed" in outcomes:
        return ExitCode.NOT_VERIFIED
    if "error" in outcomes:
        return ExitCode.FAILURE
    return ExitCode.OK if "passed" in outcomes else ExitCode.UNSUPPORTED
