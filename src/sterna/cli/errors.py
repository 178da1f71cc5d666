"""How commands fail, and their exit codes."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum

from sterna.errors import Error

_ECHO_LIMIT = 80
_ELLIPSIS = "..."


class ExitCode(IntEnum):
    """Exit codes of all commands."""

    OK = 0
    FAILURE = 1
    """The command could not do its work: a file is missing, nobody listens, the guest broke."""
    USAGE = 2
    """The command was called wrongly."""
    MIGRATION_FAILED = 3
    """The migration failed; the verdict says where the guest is."""
    CANCELLED = 4
    """The migration was cancelled; the guest is at the source, and runs if it ran before."""
    NOT_VERIFIED = 5
    """The migration completed and the check that was asked for did not take place or did not hold."""
    LOST = 6
    """The connection to the VM was lost during the migration: its outcome is unknown here."""
    UNSUPPORTED = 7
    """What was asked for cannot be done by this machine or this program; nothing failed, and nothing was found wrong."""
    NOT_ASKED = 8
    """The migration completed for its source, and the destination was not asked whether it took the guest."""
    INTERRUPTED = 130
    """Ended by SIGINT."""


class CliError(Error):
    """A command that fails, with one line for the user."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILURE) -> None:
        super().__init__(message)
        self.code = code


class UsageError(CliError):
    """A wrong call."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.USAGE)


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Write what a command makes.

    :raise CliError: When it cannot be written.
    """
    from sterna.host.newfile import write_report

    try:
        write_report(path, data)
    except OSError as error:
        raise CliError(f"cannot write {path}: {error.strerror}") from error


@contextmanager
def hypervisor_refusals() -> Iterator[None]:
    """What this host has not, by the body of the `with` statement, is not supported."""
    from sterna.hypervisor.interface import Unsupported

    try:
        yield
    except Unsupported as error:
        raise CliError(str(error), ExitCode.UNSUPPORTED) from error


def shorten_echo(message: str, arguments: Iterable[str]) -> str:
    """An error's text without the middle of what a user's argument has beyond `_ECHO_LIMIT` characters. Files
    that exist keep their names.
    """
    echoed = {
        shown
        for argument in arguments
        for part in (argument, argument.partition("=")[2], *argument.split())
        if len(part) > _ECHO_LIMIT and not os.path.exists(part)
        for shown in (part, " ".join(part.split()), repr(part)[1:-1])
    }
    for text in sorted(echoed, key=len, reverse=True):
        if len(text) > _ECHO_LIMIT:
            head = 2 * _ECHO_LIMIT // 3
            message = message.replace(
                text, text[:head] + _ELLIPSIS + text[head + len(_ELLIPSIS) - _ECHO_LIMIT :]
            )
    return message
