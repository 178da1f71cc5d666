"""`sterna bench`: migrations measured, side by side with QEMU's where it is installed."""

import json as json_module
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from sterna.cli.errors import CliError, ExitCode, UsageError, hypervisor_refusals
from sterna.cli.paths import NamedPath

if TYPE_CHECKING:
    from sterna.bench.kvm.report import Modes
    from sterna.bench.workloads import Variant

_DIRTY_LOG = "dirty-log"
_QUICK_MEMORY = "64M"
_QUICK_TIMEOUT = 10.0
_WIDTH = 1000
"""Of what is no terminal: tables are as wide as they are."""


@click.command("bench")
@click.argument("names", nargs=-1, metavar="[WORKLOAD]...")
@click.option("--list", "listing", is_flag=True, help="List workloads and variants, and measure nothing.")
@click.option("--runs", type=click.IntRange(1, 100), help="Runs behind each median.  [default: 5]")
@click.option(
    "--accel",
    type=click.Choice(["emulated", "kvm"]),
    default="emulated",
    help="The hypervisor. kvm: this host's, and its dirty log by itself beside the kernel's own part of it.",
)
@click.option(
    "--memory", help="Guest RAM instead of each workload's own; what the guest writes scales with it."
)
@click.option(
    "--only", multiple=True, metavar="VARIANT", help="Measure this variant only; may be given again."
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=1, max=86400),
    help="Seconds after which a migration counts as not converging.  [default: 60]",
)
@click.option(
    "--qemu",
    type=NamedPath(),
    metavar="PATH",
    help="The QEMU beside it; else qemu-system-arm where it is installed.",
)
@click.option("--quick", is_flag=True, help="A small guest, few workloads and variants, one run.")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def command(
    names: tuple[str, ...],
    listing: bool,
    runs: int | None,
    accel: str,
    memory: str | None,
    only: tuple[str, ...],
    timeout: float | None,
    qemu: str | None,
    quick: bool,
    json: bool,
) -> int:
    """Measure migrations between two processes of this host: sterna's, QEMU's where it is installed, and two
    processes that only pass memory on, the raw ceiling.

    All migrate the same guest image with the same memory and limits, in turn. Without WORKLOAD all of them are
    measured, which takes more than an hour.

    With --accel kvm: some minutes. WORKLOAD may also be dirty-log; its memory is its own.
    """
    from sterna.bench.campaign import CampaignSettings, compare, guest_config
    from sterna.bench.report import print_report, to_json
    from sterna.bench.workloads import KVM_VARIANTS, VARIANTS, WORKLOADS, Who
    from sterna.cli.kernels import compile_kernels
    from sterna.guests.catalog import GuestError
    from sterna.hypervisor.accelerator import check_arch
    from sterna.launch.errors import LaunchError, Unsupported
    from sterna.launch.qemu import find_qemu
    from sterna.launch.signals import Interrupts
    from sterna.machine.config import ConfigError, parse_memory

    def note(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    kvm = accel == "kvm"
    if qemu is not None and kvm:
        raise UsageError("--qemu: no QEMU is measured beside --accel kvm")
    known_variants = KVM_VARIANTS if kvm else VARIANTS
    known_names = {**WORKLOADS, **({_DIRTY_LOG: None} if kvm else {})}
    if listing:
        _list(kvm)
        return ExitCode.OK
    for given, known, what in ((names, known_names, "workload"), (only, known_variants, "variant")):
        for name in given:
            if name not in known:
                raise UsageError(f"no {what} {name!r:.80}; there are: {', '.join(known)}")
    workloads = [WORKLOADS[name] for name in WORKLOADS if name in names or not names]
    variants = [known_variants[name] for name in known_variants if name in only or not only]
    if kvm and not names:
        workloads = [one for one in workloads if one.quick or one.name == "dirty"]
    if quick:
        workloads = [one for one in workloads if one.quick or names]
        variants = [one for one in variants if one.quick or only]
    try:
        size = _QUICK_MEMORY if memory is None and quick else memory
        settings = CampaignSettings(
            runs or (1 if quick else 5),
            None if size is None else parse_memory(size),
            timeout or (_QUICK_TIMEOUT if quick else 60.0),
            accel,
        )
        for workload in workloads:
            guest_config(workload, settings.memory_bytes, accel)
    except (ConfigError, GuestError) as error:
        raise UsageError(str(error)) from error

    if qemu is not None or any(one.who is Who.QEMU for one in variants):
        try:
            settings = replace(settings, qemu=find_qemu(qemu))
        except Unsupported as error:
            note(f"{error}; sterna is measured alone")
            variants = [one for one in variants if one.who is not Who.QEMU]
        except LaunchError as error:
            raise UsageError(f"--qemu: {error}") from error
    log = kvm and (not names or _DIRTY_LOG in names)
    if not log and not any(one.fits(workload) for one in variants for workload in workloads):
        raise UsageError("none of these variants is measured with these workloads; see sterna bench --list")
    with Interrupts().caught() as interrupts:
        check = interrupts.check
        modes = _measure_kvm(variants, log, quick, settings.runs, check, note) if kvm else None
        if modes is not None:
            variants = [one for one in variants if one.who is Who.RAW or one.dirty_log not in modes.missing]
        if not kvm and any(one.who is Who.STERNA for one in variants):
            with hypervisor_refusals():
                check_arch(accel)
            compile_kernels(check=check)
        done = [compare(workload, variants, settings, check, note) for workload in workloads]
    if json:
        result = to_json(done, settings)
        click.echo(json_module.dumps(result if modes is None else modes.add_to(result)))
    else:
        from rich.console import Console

        console = Console()
        if not console.is_terminal:
            console.width = _WIDTH
        if modes is not None:
            modes.print(console)
        print_report(console, done, settings)
    failed = [run for one in done for row in one.series for run in row.measurements if run.error]
    return ExitCode.FAILURE if failed else ExitCode.OK


def _measure_kvm(
    variants: Sequence["Variant"],
    log: bool,
    quick: bool,
    runs: int,
    check: Callable[[], None],
    note: Callable[[str], None],
) -> "Modes":
    from sterna.bench.kvm.report import find_modes
    from sterna.bench.workloads import Who
    from sterna.cli.kernels import prepare_kernels

    with hypervisor_refusals():
        modes = find_modes([one.dirty_log for one in variants if one.who is Who.STERNA])
        if not modes.there:
            raise CliError("; ".join(dict.fromkeys(modes.missing.values())), ExitCode.UNSUPPORTED)
        prepare_kernels("kvm", check)
        return modes.measured(quick, runs, check, note) if log else modes


def _list(kvm: bool) -> None:
    from sterna.bench.workloads import KVM_VARIANTS, VARIANTS, WORKLOADS
    from sterna.host.units import format_size

    click.echo("Workloads:")
    for workload in WORKLOADS.values():
        click.echo(f"  {workload.name:<26}{workload.title}, {format_size(workload.memory_bytes)}")
    if kvm:
        click.echo(f"  {_DIRTY_LOG:<26}what the dirty log's calls take, beside the kernel's own part of it")
    click.echo("Variants:")
    for variant in (KVM_VARIANTS if kvm else VARIANTS).values():
        settings = [*variant.capabilities, *(f"{name}={value}" for name, value in variant.parameters.items())]
        click.echo(f"  {variant.name:<26}{', '.join(settings) or _PLAIN[variant.who.value]}")


_PLAIN = {
    "sterna": "as it is, RAM verified",
    "qemu": "as it is",
    "raw": "two processes that pass memory on, one connection",
}
