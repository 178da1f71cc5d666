"""An ssh session with a guest, and how it lives through a migration."""

import contextlib
import os
import subprocess
import tempfile
import threading
import time
from functools import partial
from pathlib import Path
from typing import BinaryIO, cast

from sterna.host.closing import Closing
from sterna.launch.host import Host
from sterna.launch.process import move_in
from sterna.testbed.errors import BedError
from sterna.testbed.evidence import Conversation

_OPEN_SECONDS = 60.0
_PERIOD_SECONDS = 0.05


class SshSession(Closing):
    """A shell in the guest that is asked to say a number, and the next when it has: 20 times a second at most. A context
    manager: closed at its end.

    :ivar seen: what it has been like so far

    :param client: where ssh runs
    :param address: of the guest
    :param key: the private key that opens it
    :param host_key: the guest's public key
    :param directory: for ssh's list of known hosts
    :raise BedError: When the guest does not open; with what ssh said.
    """

    def __init__(self, client: Host, address: str, key: Path, host_key: str, directory: Path) -> None:
        known = directory / "known_hosts"
        known.write_text(f"{address} {host_key}\n")
        self.seen = Conversation()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._talk, name="ssh", daemon=True)

        options = {
            "BatchMode": "yes",
            "ConnectTimeout": str(round(_OPEN_SECONDS)),
            "IdentitiesOnly": "yes",
            "StrictHostKeyChecking": "yes",
            "UserKnownHostsFile": str(known),
        }
        told = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
        with contextlib.ExitStack() as opened:
            try:
                self._errors = opened.enter_context(tempfile.TemporaryFile())
                self._process = subprocess.Popen(
                    ["ssh", "-F", "none", "-T", "-i", str(key), *told, f"root@{address}", "sh"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._errors,
                    env=os.environ | {"SSH_AUTH_SOCK": ""},
                    process_group=0,
                    preexec_fn=partial(move_in, client),
                )
                opened.callback(self._end)
                self._thread.start()
            except (OSError, subprocess.SubprocessError, RuntimeError) as error:
                raise BedError(f"cannot start ssh: {getattr(error, 'strerror', error)}") from error
            if not self.wait_answers(1, _OPEN_SECONDS):
                raise BedError(
                    f"the guest does not answer over ssh: {self._said() or '; '.join(self.seen.problems)}"
                )
            self._opened = opened.pop_all()

    @property
    def answered(self) -> int:
        """How many numbers came back."""
        return self.seen.answers

    def wait_answers(self, count: int, seconds: float) -> bool:
        """Wait until so many have come back; whether they did in time."""
        deadline = time.monotonic() + seconds
        while self.answered < count:
            if self.seen.problems or self._process.poll() is not None or time.monotonic() > deadline:
                return False
            time.sleep(_PERIOD_SECONDS)
        return True

    def close(self) -> None:
        """End it. Does nothing the second time."""
        self._opened.close()

    def _end(self) -> None:
        self._stop.set()
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        if self._thread.ident is not None:  # it was started
            self._thread.join(_OPEN_SECONDS)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                cast(BinaryIO, stream).close()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read(1000).decode(errors="replace").strip().replace("\n", "; ")

    def _talk(self) -> None:
        """On a thread of its own: one question after the other."""
        own, its = cast(BinaryIO, self._process.stdin), cast(BinaryIO, self._process.stdout)
        last = 0.0
        number = 0
        while not self._stop.wait(_PERIOD_SECONDS):
            number += 1
            try:
                own.write(f"echo {number}\n".encode())
                own.flush()
                answer = its.readline(100)
            except OSError as error:
                answer = str(error).encode()
            if answer != f"{number}\n".encode():
                if not self._stop.is_set():
                    self.seen.problems.append(f"to question {number} the session answered {answer[:40]!r}")
                return
            now = time.monotonic()
            if last:
                self.seen.silence_ms = max(self.seen.silence_ms, (now - last) * 1000)
            last = now
            self.seen.answers += 1
