"""`sterna testbed`: the test environment."""

import click

from sterna.cli.testbedhost import host
from sterna.cli.testbedrun import clean, list_scenarios, run


@click.group("testbed")
def command() -> None:
    """The test environment: scenarios that migrate VMs between hosts and check everything, and hosts to run sterna on."""


for subcommand in (clean, host, list_scenarios, run):
    command.add_command(subcommand)
