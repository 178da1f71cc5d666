"""The shared file system: nfs-ganesha in the server's network, exporting one directory to all hosts.

Its processes see a /run and a /var/lib/nfs of their own, in a mount namespace that goes with them: nothing of theirs is
left behind, and no other NFS server of this machine is disturbed.
"""

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from sterna.host.closing import Closing
from sterna.launch.errors import Unsupported
from sterna.launch.host import Host
from sterna.launch.process import die_with_parent
from sterna.testbed.errors import BedError

_PROGRAMS = (("rpcbind", "rpcbind"), ("ganesha.nfsd", "nfs-ganesha"))
_FSAL = ("ganesha/libfsalvfs.so", "nfs-ganesha-vfs")
_CLONE_NEWNS = 0x00020000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_STARTED = "NFS SERVER INITIALIZED"
_NOTHING = "No export entries found"
_LOG_LINES = 3
# rpcbind gives up root, and with that the signal at its parent's end (prctl(2)): the shell reads until our end is gone.
_PORTMAPPER = "rpcbind -f -w & read -r end; kill -9 $!; wait $!"
_CONFIGURATION = """\
NFS_CORE_PARAM {{
    Protocols = 3;
    Enable_NLM = false;
    Enable_RQUOTA = false;
}}
NFS_KRB5 {{ Active_krb5 = false; }}
EXPORT {{
    Export_Id = 1;
    Path = "{path}";
    Pseudo = "/sterna";
    Protocols = 3;
    Transports = TCP;
    Access_Type = RW;
    Squash = No_Root_Squash;
    SecType = sys;
    FSAL {{ Name = VFS; }}
}}
"""
# No libc call that takes long or locks: this runs between fork and exec.
_libc = ctypes.CDLL(None, use_errno=True)


def check_tools() -> None:
    """
    :raise Unsupported: When a program is missing; with the package that has it.
    """
    for program, package in _PROGRAMS:
        if shutil.which(program, path=_path()) is None:
            raise Unsupported(f"{program} is missing: apt install {package}")
    library, package = _FSAL
    if not any(Path("/usr/lib").glob(f"*/{library}")) and not (Path("/usr/lib") / library).exists():
        raise Unsupported(f"ganesha's {Path(library).name} is missing: apt install {package}")


class NfsServer(Closing):
    """Serves NFS version 3, as QEMU's client speaks it. A context manager: its processes are gone at its end.

    :param host: where
    :param path: the directory to export
    :param directory: for its configuration and log
    :raise Unsupported: When a program is missing.
    :raise BedError: When it does not start; with the end of its log.
    """

    def __init__(self, host: Host, path: Path, directory: Path) -> None:
        check_tools()
        self._host = host
        self.path = path
        self._log = directory / "ganesha.log"
        configuration = directory / "ganesha.conf"
        configuration.write_text(_CONFIGURATION.format(path=path))
        self._processes: list[subprocess.Popen[bytes]] = []
        with contextlib.ExitStack() as stack:
            stack.callback(self.close)
            portmapper = self._start(["sh", "-c", _PORTMAPPER], _new_mounts, until_closed=True)
            its = Path(f"/proc/{portmapper.pid}")
            self._wait((its / "root/run/rpcbind.sock").exists, "rpcbind")
            mounts = os.open(its / "ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, mounts)
            command = ["ganesha.nfsd", "-F", "-f", str(configuration), "-L", str(self._log)]
            self._start(
                [*command, "-p", "/run/ganesha/pid"],
                lambda: _check(_libc.setns(mounts, _CLONE_NEWNS), "enter the mount namespace"),
            )
            self._wait(lambda: _STARTED in self._said(), "ganesha.nfsd")
            if _NOTHING in self._said():
                raise BedError(f"ganesha.nfsd does not export {path}: {self._complaint()}")
            os.close(mounts)
            stack.pop_all()

    def url(self, name: str) -> dict[str, str]:
        """A file of the export, for QEMU's -blockdev."""
        return {
            "driver": "nfs",
            "server.type": "inet",
            "server.host": self._host.address,
            "path": f"{self.path}/{name}",
        }

    def close(self) -> None:
        """End it. Does nothing the second time."""
        while self._processes:
            process = self._processes.pop()
            if process.stdin is not None:
                process.stdin.close()
            else:
                process.send_signal(signal.SIGKILL)  # in order it would take seconds
            process.wait()

    def _start(
        self, command: Sequence[str], mounts: Callable[[], None], *, until_closed: bool = False
    ) -> "subprocess.Popen[bytes]":
        """
        :param until_closed: it ends when its standard input does; else it is killed
        """

        def enter() -> None:
            if not until_closed:
                die_with_parent()
            self._host.enter()
            mounts()

        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE if until_closed else subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=os.environ | {"PATH": _path()},
                process_group=0,
                preexec_fn=enter,
            )
        except (OSError, subprocess.SubprocessError) as error:
            raise BedError(f"cannot start {command[0]}: {getattr(error, 'strerror', error)}") from error
        self._processes.append(process)
        return process

    def _wait(self, ready: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while not ready():
            ended = self._processes[-1].poll()
            if ended is not None or time.monotonic() > deadline:
                said = self._complaint()
                how = f"ended with {ended}" if ended is not None else f"is not up in {_START_SECONDS:g} s"
                raise BedError(f"{name} {how}" + (f": {said}" if said else ""))
            time.sleep(_POLL_SECONDS)

    def _complaint(self) -> str:
        """What its log ends with; if there are any, the lines that say what is wrong."""
        lines = self._said().splitlines()
        wrong = [line for line in lines if ":CRIT :" in line and ":DBUS :" not in line and "krb5" not in line]
        return "; ".join((wrong or lines)[-_LOG_LINES:])

    def _said(self) -> str:
        try:
            return self._log.read_text(errors="replace")
        except OSError:
            return ""


def _new_mounts() -> None:
    _check(_libc.unshare(_CLONE_NEWNS), "make a mount namespace")
    _check(_libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None), "keep mounts apart")
    for path, folder in ((b"/run", "ganesha"), (b"/var/lib/nfs", "ganesha")):
        _check(_libc.mount(b"sterna", path, b"tmpfs", 0, None), "mount a tmpfs")
        os.mkdir(os.path.join(os.fsdecode(path), folder))
    os.mkdir("/run/rpcbind")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"cannot {what}")


def _path() -> str:
    """Where servers are, which a user's PATH may leave out."""
    return f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
