"""Options of the commands that make machines."""

import click

board = click.option(
    "--machine",
    default="",
    help="The board: virt or vexpress-a15; with kvm virt-arm64 on arm64, pc-min on x86_64.  "
    "[default: virt, or the one that kvm runs]",
)
accelerator = click.option(
    "--accel", default="emulated", show_default=True, help="The hypervisor: emulated or kvm."
)
dirty_log = click.option(
    "--dirty-log",
    default="bitmap",
    show_default=True,
    help="How the hypervisor keeps its dirty log: bitmap, manual, or ring with kvm.",
)
