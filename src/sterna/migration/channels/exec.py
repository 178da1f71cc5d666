"""`exec:COMMAND`: a shell command that takes the stream on its standard input, or gives it on its output."""

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import threading
from dataclasses import dataclass
from functools import partialmethod

from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel, describe
from sterna.migration.errors import ChannelError, UriError

FORM = "exec:COMMAND"
_PIPE_BYTES = 1 << 20
"""What an unprivileged process may ask for (/proc/sys/fs/pipe-max-size); fewer waits than with 64 KiB."""


class ExecChannel(Channel):
    """A pipe to or from a command. What is written counts as delivered when the command has exited with 0; one that is read from
    may do what it likes once all has come.
    """

    def __init__(
        self, cancellation: Cancellation, peer: str, process: "subprocess.Popen[bytes]", *, write: bool
    ) -> None:
        pipe = process.stdin if write else process.stdout
        assert pipe is not None
        fd = pipe.fileno()
        super().__init__(
            cancellation, peer, read_fd=None if write else fd, write_fd=fd if write else None, owner=pipe
        )
        self._process = process
        self._has_sent = False
        try:
            fcntl.fcntl(fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        except OSError:  # this user's share of pipe memory is used up; the smaller pipe works as well
            pass

    def finish(self) -> None:
        if self._write_fd is None:
            self._has_sent = True
            return
        self._owner.close()
        self._write_fd = None
        watch = self.watch_exit()
        try:
            self._wait(watch, select.POLLIN)
        finally:
            os.close(watch)
        self.check_exit()

    def watch_exit(self) -> int:
        """A descriptor that polls readable when the command has ended; for the caller to close. Before `close` only."""
        return os.pidfd_open(self._process.pid)

    def check_exit(self) -> None:
        """
        :raise ChannelError: When the command, which has ended, failed.
        """
        status = self._process.wait()
        if status:
            how = f"was killed by signal {-status}" if status < 0 else f"exited with {status}"
            raise ChannelError(f"{self.peer}: the command {how}")

    def close(self) -> None:
        super().close()
        if self._process.poll() is not None:
            return
        ended = self.decisive_at is not None and self.transferred >= self.decisive_at
        if ended or self._has_sent:
            # It may be what runs the guest now, or has sent it. Whenever it ends, somebody takes its exit status: where the host
            # has no thread to spare, `Popen` does for the next command.
            with contextlib.suppress(RuntimeError):
                threading.Thread(target=self._process.wait, name="exec-exit", daemon=True).start()
        else:
            # The shell leads its own process group, so whatever it started goes with it.
            try:
                os.killpg(self._process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            self._process.wait()


@dataclass(frozen=True)
class ExecUri:
    """:ivar command: for `/bin/sh -c`"""

    command: str

    def __str__(self) -> str:
        return f"exec:{self.command}"

    def _start(self, cancellation: Cancellation, *, write: bool) -> Channel:
        """Start the command with a pipe on its standard input, or read its standard output.

        :raise ChannelError: When it cannot be started.
        """
        try:
            process = subprocess.Popen(
                ["/bin/sh", "-c", self.command],
                stdin=subprocess.PIPE if write else subprocess.DEVNULL,
                stdout=None if write else subprocess.PIPE,
                bufsize=0,
                start_new_session=True,
            )
        except (OSError, ValueError) as error:
            raise ChannelError(f"cannot start {self}: {describe(error)}") from error
        return ExecChannel(cancellation, str(self), process, write=write)

    connect = partialmethod(_start, write=True)
    open_incoming = partialmethod(_start, write=False)


def parse(rest: str) -> ExecUri:
    """Parse what follows `exec:`.

    :raise UriError: When there is no command.
    """
    if not rest.strip() or "\0" in rest:
        raise UriError(f"exec: the command is missing or holds a zero byte; expected {FORM}")
    return ExecUri(rest)
