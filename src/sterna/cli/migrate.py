"""`sterna migrate`: a running VM moves, and one watches."""

import json as json_module
from typing import TYPE_CHECKING

import click

from sterna.cli.errors import CliError, ExitCode, UsageError

if TYPE_CHECKING:
    from sterna.monitor.client import QmpClient

_GREETING_SECONDS = 10.0
"""How long a VM may take to greet. A QEMU serves one QMP client at a time and lets others wait without a word."""


@click.command("migrate")
@click.argument("qmp_address", metavar="QMP-ADDRESS")
@click.argument("uri")
@click.option("-d", "--detach", is_flag=True, help="Start the migration and do not wait for it.")
@click.option(
    "--bandwidth", metavar="RATE", help="Limit, such as 1Gbit or 128MiB (per second), or unlimited."
)
@click.option("--downtime-limit", metavar="TIME", help="How long the guest may stand still, such as 300ms.")
@click.option(
    "--auto-converge/--no-auto-converge",
    default=None,
    help="Slow the guest down if it dirties memory faster than it can be sent.",
)
@click.option(
    "--policy",
    metavar="POLICY",
    help="adaptive (the default), fixed (QEMU's rules) or deadline:SECONDS (in time, or not at all).",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="Any migration parameter, or a capability as on or off.",
)
@click.option(
    "--verify/--no-verify",
    default=None,
    help="Insist on comparing RAM at both ends, or do not. By default it is compared where both can.",
)
@click.option(
    "--audit/--no-audit",
    default=None,
    help="Have the source compare RAM with what it has sent after every look at the dirty log. By default as it is set there.",
)
@click.option("--json", is_flag=True, help="Print one JSON object at the end.")
def command(
    qmp_address: str,
    uri: str,
    detach: bool,
    bandwidth: str | None,
    downtime_limit: str | None,
    auto_converge: bool | None,
    policy: str | None,
    settings: tuple[str, ...],
    verify: bool | None,
    audit: bool | None,
    json: bool,
) -> int:
    """Migrate the VM whose QMP is at QMP-ADDRESS (unix:PATH or tcp:HOST:PORT) to URI.

    Ctrl-C, SIGTERM or SIGHUP cancels: the guest stays at the source. Settings are for this migration, and set back
    after it; with -d they stay. A QEMU gets the capability return-path for it, so that it hears of a refusal.

    \b
    Exit codes: 0 completed (with -d: started), 1 could not start, 2 wrong call,
    3 failed, 4 cancelled, 5 completed but not verified although asked to,
    6 the VM was lost on the way, or does not say how it went,
    8 completed for the source, and nobody has asked the destination.
    """
    from sterna.cli.appliedsettings import applied, asked_parameters, asked_settings
    from sterna.cli.display import choose_display
    from sterna.cli.result import exit_code, summarise
    from sterna.cli.watch import watch_migration
    from sterna.launch.signals import Interrupts
    from sterna.migration.channels.uri import parse_destination
    from sterna.migration.errors import UriError
    from sterna.monitor.addresses import AddressError, parse_address
    from sterna.monitor.client import QmpClient

    wanted = asked_settings(settings)
    wanted.parameters |= asked_parameters(bandwidth, downtime_limit, policy, verify, audit)
    if auto_converge is not None:
        wanted.capabilities["auto-converge"] = auto_converge
    try:
        parse_destination(uri)
        address = parse_address(qmp_address)
    except (UriError, AddressError) as error:
        raise UsageError(str(error)) from error
    client = QmpClient.connect(address, greeting_seconds=_GREETING_SECONDS)
    with client, choose_display(json=json) as display, Interrupts().caught() as interrupts:
        _check_source(client)
        wanted.capabilities = _return_path(client, uri) | wanted.capabilities
        with applied(client, wanted) as applied_settings:
            _begin(client, uri)
            if detach:
                applied_settings.keep = True
                if json:
                    click.echo(json_module.dumps({"status": "started"}))
                elif applied_settings.changed:
                    click.echo(f"started; these settings stay: {', '.join(sorted(applied_settings.changed))}")
                return ExitCode.OK
            display.note(f"settings: {applied_settings.text()}")
            info = watch_migration(client, display, interrupts)
            summary = summarise({**info, "uri": uri}, applied_settings.capabilities)
        display.outcome(summary)
    if json:
        told = applied_settings.parameters | {"capabilities": applied_settings.capabilities}
        click.echo(json_module.dumps(summary | {"settings": told}))
    return exit_code(summary, must_verify=bool(verify))


def _begin(client: "QmpClient", uri: str) -> None:
    from sterna.monitor.client import ConnectionLost

    try:
        client.command("migrate", uri=uri)
    except ConnectionLost as error:
        raise CliError(
            f"the VM was lost as it was told to migrate; whether it has begun is not known here: {error}",
            ExitCode.LOST,
        ) from error


def _check_source(client: "QmpClient") -> None:
    """Nothing is set on a VM that another migration would feel it on.

    :raise CliError: When it cannot migrate now.
    """
    from sterna.launch.watch import FINAL
    from sterna.monitor.answers import Migration, RunState

    if client.query("query-status", RunState)["status"] == "inmigrate":
        raise CliError(
            "this VM waits for a guest itself: QMP-ADDRESS is to be the source's, and URI where the destination waits"
        )
    status = client.query("query-migrate", Migration).get("status", "none")
    if status not in (*FINAL, "none"):
        raise CliError(f"there is a migration in progress already, in status {status}")


def _return_path(client: "QmpClient", uri: str) -> dict[str, bool]:
    """A sterna asks wherever the channel works both ways; a QEMU only with the capability return-path."""
    from sterna.monitor.answers import MigrationParameters

    sterna = "x-sterna-policy" in client.query("query-migrate-parameters", MigrationParameters)
    return {} if sterna or not uri.startswith(("tcp:", "unix:")) else {"return-path": True}
