"""`sterna migrate`: a running VM moves, and one watches."""

import json as json_module
from typing import Any

import click

from sterna.cli.errors import CliError, ExitCode, UsageError

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
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Any migration parameter.")
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

    Ctrl-C, SIGTERM or SIGHUP cancels: the guest goes on at the source.

    \b
    Exit codes: 0 completed (with -d: started), 1 could not start, 2 wrong call,
    3 failed, 4 cancelled, 5 completed but not verified although asked to,
    6 the VM was lost on the way.
    """
    from sterna.cli.display import choose_display
    from sterna.cli.follow import Interrupts, follow
    from sterna.cli.result import exit_code, summarise
    from sterna.monitor.addresses import AddressError, parse_address
    from sterna.monitor.client import ConnectionLost, QmpClient
    from sterna.monitor.protocol import QmpError

    parameters = _parameters(bandwidth, downtime_limit, policy, settings, verify)
    if audit is not None:
        parameters["x-sterna-audit"] = audit
    _check_uri(uri)
    try:
        address = parse_address(qmp_address)
    except AddressError as error:
        raise UsageError(str(error)) from error
    try:
        client = QmpClient.connect(address, greeting_seconds=_GREETING_SECONDS)
    except (AddressError, ConnectionLost) as error:
        raise CliError(str(error)) from error
    with client, choose_display(json=json) as display, Interrupts().caught() as interrupts:
        try:
            if parameters:
                client.execute("migrate-set-parameters", parameters)
            if auto_converge is not None:
                state = {"capability": "auto-converge", "state": auto_converge}
                client.execute("migrate-set-capabilities", {"capabilities": [state]})
            client.command("migrate", uri=uri)
        except (QmpError, ConnectionLost) as error:
            raise CliError(str(error)) from error
        if detach:
            if json:
                click.echo(json_module.dumps({"status": "started"}))
            return ExitCode.OK
        summary = summarise(follow(client, display, interrupts))
        display.outcome(summary)
    if json:
        click.echo(json_module.dumps(summary))
    return exit_code(summary, must_verify=bool(verify))


def _check_uri(uri: str) -> None:
    from sterna.migration.channels.uri import parse
    from sterna.migration.errors import UriError

    try:
        parse(uri)
    except UriError as error:
        raise UsageError(str(error)) from error


def _parameters(
    bandwidth: str | None,
    downtime_limit: str | None,
    policy: str | None,
    settings: tuple[str, ...],
    verify: bool | None,
) -> dict[str, Any]:
    """The migration parameters to set, checked before anything is started."""
    from sterna.cli.settings import bandwidth_value, duration_value, policy_values
    from sterna.monitor.parameters import parse_parameter
    from sterna.monitor.protocol import QmpError

    parameters: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting[:80]!r}: expected NAME=VALUE")
        try:
            parameters[name] = parse_parameter(name, text, default_unit="")
        except QmpError as error:
            raise UsageError(f"--set {setting[:80]!r}: {error.desc}") from error
    if bandwidth is not None:
        parameters["max-bandwidth"] = bandwidth_value(bandwidth)
    if downtime_limit is not None:
        parameters["downtime-limit"] = duration_value(downtime_limit)
    if policy is not None:
        parameters |= policy_values(policy)
    if verify is not None:
        parameters["x-sterna-verify"] = "on" if verify else "off"
    return parameters
