"""Networks and processes of the test bed."""

from tests.cli.conftest import _compiled, _same_program, cli, command_line  # noqa: F401 - fixtures
