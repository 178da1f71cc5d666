"""`sterna demo`: the main job in one command."""

import json as json_module
import sys

import click

from sterna.cli import machineoptions
from sterna.cli.errors import ExitCode, UsageError, hypervisor_refusals


@click.command("demo")
@machineoptions.board
@machineoptions.accelerator
@machineoptions.dirty_log
@click.option("--kernel", default="dirtyram", show_default=True, help="The guest: dirtyram, clock or random.")
@click.option("--append", help="The guest's arguments.  [default: 102580 812 30 for dirtyram]")
@click.option("--memory", default="1792M", show_default=True, help="Size of RAM.")
@click.option("--smp", type=int, default=1, show_default=True, help="Number of CPUs.")
@click.option(
    "--bandwidth", default="unlimited", show_default=True, help="Limit, such as 1Gbit or 128MiB (per second)."
)
@click.option(
    "--downtime-limit", default="300ms", show_default=True, help="How long the guest may stand still."
)
@click.option(
    "--auto-converge/--no-auto-converge",
    default=True,
    show_default=True,
    help="Slow the guest down if it dirties memory faster than it can be sent.",
)
@click.option(
    "--policy", default="adaptive", show_default=True, help="Or fixed (QEMU's rules), or deadline:SECONDS."
)
@click.option(
    "--audit", is_flag=True, help="Compare RAM with what was sent after every look at the dirty log."
)
@click.option("--json", is_flag=True, help="Print one JSON object.")
def command(
    machine: str,
    accel: str,
    dirty_log: str,
    kernel: str,
    append: str | None,
    memory: str,
    smp: int,
    bandwidth: str,
    downtime_limit: str,
    auto_converge: bool,
    policy: str,
    audit: bool,
    json: bool,
) -> int:
    """Migrate a guest that dirties memory between two processes over TCP, and check everything.

    Both ends' RAM is compared, and the guest's own counters and its clock are read on both sides. Exit code 0
    only when the migration completed and every check held. Ctrl-C cancels.

    A guest that dirties memory faster than this host or --bandwidth lets it be sent is throttled, and the report
    says so; --no-auto-converge leaves it alone, and such a migration may never end.
    """
    from sterna.cli.demoreport import report_lines
    from sterna.cli.demorun import DemoSettings, run_demo
    from sterna.cli.display import choose_display
    from sterna.cli.kernels import compile_kernels
    from sterna.cli.migrationoptions import bandwidth_value, duration_value, policy_values
    from sterna.guests.catalog import PROGRAMS, GuestError, validate
    from sterna.hypervisor.accelerator import ACCELERATORS, check_arch, open_vm
    from sterna.hypervisor.interface import DirtyLogMode
    from sterna.launch.signals import Interrupts
    from sterna.machine.config import ConfigError, MachineConfig, parse_memory

    if append is None:
        append = {"dirtyram": "102580 812 30", "random": "1"}.get(kernel, "")
    known = [name for name, program in PROGRAMS.items() if not program.needs_nic]
    if kernel not in known:
        raise UsageError(f"--kernel: the demo knows {', '.join(known)}; {kernel[:80]!r} is none of them")
    try:
        config = MachineConfig(
            machine=machine,
            smp=smp,
            memory_bytes=parse_memory(memory),
            accel=accel,
            dirty_log=dirty_log,
            kernel=kernel,
            append=append,
        )
        validate(kernel, append, cpus=smp, memory_bytes=config.memory_bytes, board=config.machine)
    except (ConfigError, GuestError) as error:
        raise UsageError(str(error)) from error
    settings = DemoSettings(
        config,
        bandwidth_value(bandwidth),
        duration_value(downtime_limit),
        auto_converge,
        policy_values(policy),
        audit,
    )
    with hypervisor_refusals():
        check_arch(accel, config.board.arch)
        if not ACCELERATORS.get(accel).compiled:  # costs nothing then
            open_vm(accel, config.board.arch, vcpus=smp, dirty_log=DirtyLogMode(dirty_log)).close()
    with choose_display(json=json) as display, Interrupts().caught() as interrupts:
        compile_kernels(accel, interrupts.check)
        result = run_demo(settings, display, interrupts)
    if json:
        click.echo(json_module.dumps(result))
    else:
        print("\n".join(report_lines(result, settings)), file=sys.stdout)
    if result["status"] == "cancelled":
        return ExitCode.CANCELLED
    if result["status"] != "completed":
        return ExitCode.MIGRATION_FAILED
    return ExitCode.OK if result["verified"] else ExitCode.NOT_VERIFIED
