"""`sterna run`: one virtual machine, its monitors, and its end."""

import asyncio
import contextlib
import functools
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

from sterna.cli import heap, machineoptions
from sterna.cli.errors import CliError, ExitCode, UsageError, hypervisor_refusals, write_file
from sterna.cli.paths import NamedPath
from sterna.cli.stderrlog import StderrLog
from sterna.host import logs
from sterna.launch.signals import heard_hangup
from sterna.version import VERSION

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from sterna.machine.config import MachineConfig
    from sterna.machine.machine import Machine
    from sterna.migration.controller import MigrationController
    from sterna.migration.statistics import MigrationInfo
    from sterna.monitor.addresses import Listening


@click.command("run")
@machineoptions.board
@click.option("--cpu", default="", help="The CPU model.  [default: cortex-a15, or host with kvm]")
@click.option("--smp", type=int, default=1, show_default=True, help="Number of CPUs.")
@click.option(
    "--memory", default="128M", show_default=True, help="Size of RAM, such as 1792M; a number is MiB."
)
@machineoptions.accelerator
@machineoptions.dirty_log
@click.option("--kernel", help="The guest: dirtyram, clock, random, net, or the path of an ELF file.")
@click.option("--append", default="", help="The kernel's arguments.")
@click.option("--incoming", metavar="URI|defer", help="Wait for a migration instead of starting a guest.")
@click.option(
    "--qmp",
    multiple=True,
    metavar="ADDRESS",
    help="Serve QMP at unix:PATH,server or tcp:HOST:PORT,server; fd:N is a listening socket passed on.",
)
@click.option("--monitor", type=click.Choice(["stdio", "none"]), default="none", help="A monitor for people.")
@click.option(
    "--serial",
    help="The first serial line: stdio (the default without --monitor), file:PATH, unix:PATH, null.",
)
@click.option(
    "--nic",
    multiple=True,
    metavar="tap,ifname=NAME[,mac=MAC]",
    help="A network card on a tap, by ifname=NAME or fd=N (a tap that was opened before).",
)
@click.option(
    "--device", multiple=True, metavar="NAME", help="A virtio device besides the network cards, by its name."
)
@click.option(
    "--mem-prealloc", is_flag=True, help="Take all of RAM from the host at once, not when it is touched."
)
@click.option("--paused", is_flag=True, help="Do not start the guest until `cont`.")
@click.option("--name", default="", help="A name for people.")
@click.option("--uuid", metavar="UUID", help="What tells the machine from others (capability validate-uuid).")
@click.option(
    "--ignore-section",
    multiple=True,
    metavar="NAME",
    help="A section or RAM block of an incoming guest's that it can do without, whatever it holds.",
)
@click.option("--dump-dtb", type=NamedPath(), metavar="FILE", help="Write the device tree to FILE and exit.")
def command(
    machine: str,
    cpu: str,
    smp: int,
    memory: str,
    accel: str,
    dirty_log: str,
    kernel: str | None,
    append: str,
    incoming: str | None,
    qmp: tuple[str, ...],
    monitor: str,
    serial: str | None,
    nic: tuple[str, ...],
    device: tuple[str, ...],
    mem_prealloc: bool,
    paused: bool,
    name: str,
    uuid: str | None,
    ignore_section: tuple[str, ...],
    dump_dtb: str | None,
) -> int:
    """Run a virtual machine.

    Ends with `quit`, when the guest shuts down, or by SIGINT, SIGTERM or SIGHUP. Exit code 1 when the guest broke,
    or standard output took no more of what the monitor said, 7 when this host or this program cannot have such a machine.
    """
    from sterna.machine.config import ConfigError, MachineConfig, parse_memory, parse_uuid
    from sterna.machine.nicconfig import NicConfigError, parse_nic

    if monitor == "stdio" and serial == "stdio":
        raise UsageError("--monitor and --serial cannot both be stdio")
    if kernel is None and incoming is None:
        raise UsageError("there is nothing to run: give --kernel, or --incoming for a migration")
    if ignore_section and incoming is None:
        raise UsageError("--ignore-section is of use with --incoming only")
    if kernel is not None and incoming is not None:
        raise UsageError("--kernel and --incoming exclude each other: a migration brings its guest along")
    if incoming == "fd:0" and "stdio" in (monitor, serial):
        raise UsageError("--incoming fd:0 takes standard input: --monitor and --serial cannot be stdio")
    try:
        config = MachineConfig(
            uuid=None if uuid is None else parse_uuid(uuid),
            machine=machine,
            cpu=cpu,
            smp=smp,
            memory_bytes=parse_memory(memory),
            accel=accel,
            dirty_log=dirty_log,
            kernel=kernel,
            append=append,
            serial=("null" if monitor == "stdio" or incoming == "fd:0" else "stdio")
            if serial is None
            else serial,
            nics=tuple(card for text in nic if (card := parse_nic(text)) is not None),
            devices=device,
            preallocated=mem_prealloc,
            paused=paused,
            incoming=incoming is not None,
            name=name,
        )
    except (ConfigError, NicConfigError) as error:
        raise UsageError(str(error)) from error
    if dump_dtb is not None:
        from sterna.machine import devicetree

        write_file(dump_dtb, devicetree.build(config))
        return ExitCode.OK
    return _run(config, incoming, qmp, monitor == "stdio", ignore_section)


def _run(
    config: "MachineConfig",
    incoming: str | None,
    qmp: tuple[str, ...],
    console: bool,
    ignored: tuple[str, ...],
) -> int:
    from sterna.hypervisor.accelerator import ACCELERATORS
    from sterna.machine.migratable import MigratableMachine
    from sterna.migration.channels import uri
    from sterna.migration.controller import DEFER, MigrationController
    from sterna.migration.errors import MigrationError, UriError
    from sterna.monitor.addresses import AddressError

    if incoming is not None and incoming != DEFER:
        try:
            uri.parse(incoming)
        except UriError as error:
            raise UsageError(f"--incoming: {error}") from error
    heap.share_heap()
    with contextlib.ExitStack() as stack:
        # Addresses are checked and bound before the guest costs any time.
        listening = list(_listen(qmp, stack))
        # Compiled when all that may be wrong has been found, and before there is a VM that needs them; KVM's needs none.
        prepare = functools.partial(_prepare, config.accel)
        machine = _make_machine(config, prepare if ACCELERATORS.get(config.accel).compiled else lambda: None)
        stack.callback(machine.close)
        prepare()
        stderr_log = StderrLog()
        stack.enter_context(logs.told_by(stderr_log))
        session = _RunningMachine(machine, listening, console, stderr_log, one_try=_is_one_way(incoming))
        guest = MigratableMachine(machine)
        migration = stack.enter_context(MigrationController(guest, session.emit, session.observe))
        if incoming is not None:
            try:
                migration.set_parameters({"x-sterna-ignore-sections": ",".join(ignored)})
                address = migration.incoming(incoming)
            except (MigrationError, AddressError) as error:
                raise CliError(f"--incoming: {error}") from error
            where = f"a guest {'from' if _is_one_way(incoming) else 'at'} {address}"
            what = "'migrate_incoming URI' to say where" if incoming == DEFER else where
            stderr_log.tell(f"waiting for {what}")
        return asyncio.run(session.main(migration, start=not config.paused and incoming is None))


def _prepare(accel: str) -> None:
    """Have the kernels at hand. A signal meanwhile ends the command in order: sockets have been made by now."""
    from sterna.cli.kernels import prepare_kernels
    from sterna.launch.signals import Interrupts

    with Interrupts().caught() as interrupts:
        prepare_kernels(accel, interrupts.check)
        interrupts.check()


def _is_one_way(incoming: str | None) -> bool:
    """Whether a guest comes from what can be read once, so that a failure is the last word."""
    return incoming is not None and incoming.partition(":")[0] in ("exec", "fd", "file")


def _listen(addresses: tuple[str, ...], stack: contextlib.ExitStack) -> "Iterator[Listening]":
    from sterna.monitor.addresses import AddressError, listen, parse_address

    try:
        parsed = [parse_address(address) for address in addresses]
    except AddressError as error:
        raise UsageError(f"--qmp: {error}") from error
    for address in parsed:
        if address.kind == "tcp" and not address.port:
            raise UsageError(f"--qmp: {address}: nobody would learn which port that is; choose one")
        try:
            listening = listen(address)
        except AddressError as error:
            raise CliError(f"--qmp: {error}") from error
        stack.callback(listening.close)
        yield listening


def _make_machine(config: "MachineConfig", prepare: Callable[[], None]) -> "Machine":
    from sterna.guests.catalog import GuestError
    from sterna.machine.config import ConfigError
    from sterna.machine.machine import Machine

    try:
        with hypervisor_refusals():
            return Machine(config, prepare)
    except (GuestError, ConfigError) as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        raise CliError(f"cannot make the machine: {what}{error.strerror or error}") from error
    except RuntimeError as error:  # the operating system has no thread to spare
        raise CliError(f"cannot make the machine: {error}") from error
    except MemoryError as error:
        raise CliError(f"this host cannot give {config.memory_bytes >> 20} MiB: {error}") from error


class _RunningMachine:
    """The process around a machine: events, the human monitor's lines, and what ends it.

    :param one_try: no second source can follow when an incoming migration has failed
    """

    def __init__(
        self,
        machine: "Machine",
        listening: "list[Listening]",
        console: bool,
        stderr_log: StderrLog,
        *,
        one_try: bool,
    ) -> None:
        self._stderr_log = stderr_log
        self._machine = machine
        self._listening = listening
        self._console = console
        self._loop: asyncio.AbstractEventLoop | None = None
        self._emit_to: Callable[[str, dict[str, Any]], None] | None = None
        self._one_try = one_try
        self._comes_in = False
        self._lock = threading.Lock()
        self._migration: MigrationController | None = None
        self._early_status = ""
        self._incoming_failed = self._unanswered = False
        self._ended = threading.Event()
        self._reported = False

    def emit(self, name: str, data: dict[str, Any]) -> None:
        """An event for QMP clients; from any thread."""
        if self._emit_to is not None:
            self._emit_to(name, data)

    def observe(self, name: str, data: dict[str, Any]) -> None:
        """What a migration does, whether or not clients asked for events."""
        log.info("%s: %s", name, data)
        if name == "MIGRATION" and data.get("status") in ("cancelled", "failed"):
            # Its buffers are no more of use; where it completed, a guest has just begun to run.
            heap.give_back()
        if name != "MIGRATION" or data.get("status") not in ("active", "failed", "completed"):
            return
        with self._lock:
            migration = self._migration
            if migration is None:
                # An incoming migration began before `main`, which tells it.
                self._early_status = data["status"]
                return
        self._tell_migration(data["status"], migration.info())

    def _tell_migration(self, status: str, info: "MigrationInfo") -> None:
        """Tell people of a status; the migration may be further on by now, and will tell so itself."""
        match status:
            case "active" if info.incoming:
                self._comes_in = True
                self._stderr_log.tell_rate_limited("comes in", f"a guest comes in from {info.source}")
            case "failed":
                self._tell_failure(info)
            case "completed" if info.incoming:
                self._stderr_log.tell(
                    f"the guest from {info.source} is here: {self._machine.run_state.value}"
                )
                for part in info.left_behind:
                    self._stderr_log.tell(f"left behind: {part}")
            case "completed" if info.peer:
                self._stderr_log.tell(f"the guest has migrated to {info.uri}: end this one with 'quit'")

    def _tell_failure(self, info: "MigrationInfo") -> None:
        if not info.incoming:
            self._stderr_log.tell(f"migration failed: {info.error}")
            return
        whence = f" from {info.source}" if info.socket_address and info.source else ""
        if self._machine.run_state.value != "inmigrate":
            # It is here, and stands still: only its user knows what is to become of it.
            self._stderr_log.tell(f"incoming migration{whence} failed: {info.error}")
            return
        waiting = f"; waiting for another at {info.socket_address}" if info.socket_address else ""
        # Those that bring no guest hide none that do.
        kind = "failed guest" if self._comes_in else "failed"
        self._comes_in = False
        self._stderr_log.tell_rate_limited(kind, f"incoming migration{whence} failed: {info.error}{waiting}")
        if self._one_try and self._is_unattended:
            self._incoming_failed = True
            self._quit("host-error")

    @property
    def _is_unattended(self) -> bool:
        """Whether nobody can reach the machine."""
        return not self._listening and not self._console

    async def main(self, migration: "MigrationController", *, start: bool) -> int:
        """Serve until something ends the machine.

        :return: the exit code
        """
        from sterna.monitor.commands import Commands
        from sterna.monitor.control import Control
        from sterna.monitor.hmp import HumanMonitor
        from sterna.monitor.server import QmpServer

        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        with self._lock:  # what comes next is told after this
            self._migration = migration
            self._tell_migration(self._early_status, migration.info())
        control = Control(self._machine, migration, self._quit)
        server = QmpServer(Commands(control).execute)
        self._emit_to = server.emit
        unsubscribe = self._machine.subscribe(self._machine_event)
        for number in (signal.SIGINT, signal.SIGTERM, *heard_hangup()):
            self._loop.add_signal_handler(number, self._signalled)
        try:
            # Started first: whoever's commands wait already means the guest that runs, as with QEMU.
            if start:
                self._machine.cont()
            for listening in self._listening:
                await server.serve(listening.socket)
            if self._console:
                self._start_console(HumanMonitor(control, foreground=True))
            await self._end.wait()
        finally:
            unsubscribe()
            # First of all: what comes from here on would come to a program that has gone when it is here.
            migration.refuse_guests()
            # Before the connections of a migration end: who sees them end must not find the guest running here.
            self._machine.stop()
            control.closing.set()
            await server.close()
        failed = self._machine.error or self._incoming_failed or self._unanswered
        return ExitCode.FAILURE if failed else ExitCode.OK

    # -- what ends it ----------------------------------------------------------------------------------------

    def _quit(self, reason: str) -> None:
        self._stop(reason, guest=False)

    def _stop(self, reason: str, *, guest: bool) -> None:
        """Announce the end once, and bring it about."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.emit("SHUTDOWN", {"guest": guest, "reason": reason})
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._end.set)

    def _signalled(self) -> None:
        if self._ended.is_set():
            os._exit(ExitCode.INTERRUPTED)  # asked twice: something hangs
        self._stop("host-signal", guest=False)

    def _machine_event(self, name: str, data: dict[str, Any]) -> None:
        if name == "SHUTDOWN":
            self._stop(str(data.get("reason", "guest-shutdown")), guest=bool(data.get("guest", True)))
            return
        self.emit(name, data)
        if self._machine.run_state.value == "internal-error" and not self._reported:
            self._reported = True
            self._stderr_log.tell(
                f"error: the guest stopped: {self._machine.error}", lines=True
            )  # and its registers
            if self._is_unattended:
                self._quit("guest-panic")  # nobody could look at it

    # -- the human monitor -----------------------------------------------------------------------------------

    def _start_console(self, monitor: Any) -> None:
        def loop() -> None:
            self._answer(f"sterna {VERSION} monitor - type 'help' for more information\n{_PROMPT}")
            for line in _lines(0):
                self._answer(monitor.execute(line))
                if self._ended.is_set():
                    return
                self._answer(_PROMPT)

        # Reads with os.read: a daemon thread inside sys.stdin would trip over the interpreter's end.
        threading.Thread(target=loop, name="monitor", daemon=True).start()

    def _answer(self, text: str) -> None:
        """Write what the monitor says. Where standard output takes no more it is told, once, and guest and commands go on."""
        data = text.encode(errors="replace")
        try:
            while data:
                data = data[os.write(1, data) :]
        except OSError as error:
            if not self._unanswered:
                self._unanswered = True
                self._stderr_log.tell(
                    f"error: standard output: {error.strerror}; what the monitor answers is lost"
                )


_PROMPT = "(sterna) "
_MAX_LINE = 1 << 16


def _lines(fd: int) -> Iterator[str]:
    """Lines of a descriptor until it ends."""
    kept = b""
    while True:
        try:
            data = os.read(fd, 4096)
        except OSError:
            return
        if not data:
            return
        *lines, kept = (kept + data).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace").strip()
        if len(kept) > _MAX_LINE:
            kept = b""
