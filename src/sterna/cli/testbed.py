"""`sterna testbed`: the test environment."""

import click

from sterna.cli.testbedhost import host


@click.group("testbed")
def command() -> None:
    """The test environment: hosts to run sterna on."""


command.add_command(host)
