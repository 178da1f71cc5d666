"""The command line. Each command is a module, imported only when it is called for."""

import importlib
import json
import signal
import sys
from typing import Any, NoReturn

import click

from sterna.cli.errors import CliError, ExitCode, shorten_echo
from sterna.cli.output import GuardedStream, OutputError, discard_output, guarded, open_closed_streams
from sterna.cli.paths import NamedPath
from sterna.errors import Error, InternalError
from sterna.host.printable import printable
from sterna.launch.signals import ended_in_order
from sterna.version import VERSION

COMMANDS = {
    "bench": "Measure migrations, side by side with QEMU's where it is installed.",
    "demo": "Migrate a guest that dirties memory between two processes, and check everything.",
    "doctor": "Say what this host can do, and why not.",
    "migrate": "Migrate a running VM, and show how it goes.",
    "run": "Run a virtual machine.",
    "stream": "Read a migration stream, ours or QEMU's.",
    "testbed": "The test environment.",
}
"""The commands and their one-line help, so that listing them imports none."""


class LazyGroup(click.Group):
    """Commands: each is the function `command` of the module of its name in `sterna.cli`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command = importlib.import_module(f"sterna.cli.{cmd_name}").command
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:  # to which click would add an empty line
            raise CliError("interrupted", ExitCode.INTERRUPTED) from error

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(
    cls=LazyGroup,
    invoke_without_command=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="sterna")
@click.option("-v", "--verbose", count=True, help="Say what happens; -vv everything.")
@click.option(
    "--log-file",
    type=NamedPath(),
    metavar="FILE",
    help="Add everything to FILE, also what the VMs do that a command starts.",
)
@click.pass_context
def _sterna(ctx: click.Context, verbose: int, log_file: str | None) -> None:
    """Dirty page logging and live migration for virtual machines."""
    if not verbose and log_file is None:
        return
    from sterna.host import logs

    try:
        logs.start(verbose, log_file)
    except OSError as error:
        raise CliError(f"--log-file: cannot write {log_file}: {error.strerror}") from error
    ctx.call_on_close(logs.stop)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit: 2 for a wrong call, 1 for a failure, or the command's own code."""
    given = sys.argv[1:] if arguments is None else arguments
    open_closed_streams()
    # Commands that have more to do then have handlers of their own, as soon as there is something to be done.
    with ended_in_order(signal.SIGTERM, signal.SIGHUP), guarded() as out:
        try:
            code = _run(arguments)
            out.flush()
        except OutputError as error:
            discard_output()
            _fail(str(error), error.code, given, None)
        except CliError as error:
            _fail(str(error), error.code, given, out)
        except InternalError:
            raise
        except Error as error:
            _fail(str(error), ExitCode.FAILURE, given, out)
        except click.ClickException as error:
            _fail(error.format_message(), ExitCode.USAGE, given, out)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", ExitCode.INTERRUPTED, given, out)
        except BrokenPipeError:
            discard_output()
            sys.exit(ExitCode.FAILURE)  # whoever read our output has left
    sys.exit(code)


def _run(arguments: list[str] | None) -> int:
    try:
        code = _sterna.main(arguments, prog_name="sterna", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help() if error.ctx else "")
        return ExitCode.USAGE
    return code if isinstance(code, int) else ExitCode.OK


def _fail(message: str, code: int, arguments: list[str], out: GuardedStream | None) -> NoReturn:
    """:param out: where the error goes as JSON too, if that was asked for; None: nowhere"""
    one_line = printable(shorten_echo(" ".join(message.split()), arguments))
    own = arguments[: arguments.index("--")] if "--" in arguments else arguments
    # A command may have printed its object before it failed because of what is in it.
    if "--json" in own and out is not None and not out.used:
        try:
            print(json.dumps({"status": "error", "error": one_line}), flush=True)
        except (OutputError, BrokenPipeError):
            discard_output()  # the error that there was says more
    print(f"sterna: error: {one_line}", file=sys.stderr)
    sys.exit(code)
