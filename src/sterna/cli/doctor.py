"""`sterna doctor`: what this host can do, and why not."""

import json as json_module
from typing import Any

import click

from sterna.cli.errors import ExitCode


@click.command("doctor")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def command(json: bool) -> int:
    """Say what this host can do, and why not.

    Exit code 0 when guests can run and migrate here, 1 when something they need is missing.
    """
    from sterna.cli.hostchecks import run_checks

    checks = run_checks()
    usable = all(check.ok for check in checks if check.needed)
    if json:
        report: dict[str, Any] = {
            "usable": usable,
            "checks": {
                check.name: {name: getattr(check, name) for name in ("ok", "needed", "found", "advice")}
                for check in checks
            },
        }
        click.echo(json_module.dumps(report))
    else:
        for check in checks:
            mark = click.style("ok     ", fg="green")
            if not check.ok:
                mark = (
                    click.style("MISSING", fg="red") if check.needed else click.style("absent ", fg="yellow")
                )
            click.echo(f"{mark} {check.name:<18} {check.found}")
            if check.advice:
                click.echo(f"{'':<26} {check.advice}")
        click.echo(_verdict(usable, {check.name: check.ok for check in checks}))
    return ExitCode.OK if usable else ExitCode.FAILURE


def _verdict(usable: bool, found: dict[str, bool]) -> str:
    if not usable:
        return "guests cannot run here"
    if not found["stage 2"]:
        return "guests can run and migrate here, on KVM only (--accel kvm)"
    return "guests can run and migrate here"
