"""The human monitor: commands as lines of text, answers as text shaped like QEMU's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from sterna.host.printable import printable
from sterna.monitor import protocol
from sterna.monitor.control import Control
from sterna.monitor.dump import DumpFormat, dump, parse_expression
from sterna.monitor.hmpvalues import parse_parameter
from sterna.monitor.protocol import QmpError
from sterna.monitor.report import migration_report, parameter_lines

MAX_LINE = 4096


class UsageError(QmpError):
    """The line does not fit the command; the answer points to its help."""


@dataclass(frozen=True)
class _Entry:
    """One command.

    :ivar arguments: for people; empty: it takes none, and is not called with any
    :ivar run: gets the rest of the line; None stands for an empty answer
    :ivar waits: as in `Control.command`
    """

    arguments: str
    help: str
    run: Callable[[str], str | None]
    waits: bool = False

    def line(self, name: str) -> str:
        return f"{name} {self.arguments} -- {self.help}"

    def answer(self, name: str, rest: str) -> str:
        """
        :raise UsageError: When the rest of the line is not for it.
        """
        if not self.arguments:
            _no_more(rest, name)
        return self.run(rest) or ""


class HumanMonitor:
    """Runs lines on the caller's thread.

    :param foreground: `migrate` without ``-d`` waits; otherwise it goes on in the background

    :ivar cpu: the default CPU of commands that concern one
    """

    def __init__(self, control: Control, *, foreground: bool = False) -> None:
        self._control = control
        self.cpu = 0
        self._foreground = foreground
        machine, migration = control.machine, control.migration
        name = machine.config.name
        version = protocol.QEMU_VERSION
        enabled = "enabled" if machine.config.accel == "kvm" else "disabled"
        self._commands: Mapping[str, _Entry] = {
            "cont|c": _Entry(
                "[-f]", "resume emulation (-f: even if the guest may run elsewhere)", self._cont
            ),
            "cpu": _Entry("index", "set the default CPU", self._set_cpu),
            "help|?": _Entry("[cmd]", "show the help", self._help),
            "info": _Entry("[subcommand]", "show various information about the system state", self._info),
            "migrate": _Entry(
                "[-d] uri", "migrate to URI (using -d to not wait for completion)", self._migrate, waits=True
            ),
            "migrate_cancel": _Entry("", "cancel the current VM migration", lambda _: migration.cancel()),
            "migrate_incoming": _Entry(
                "uri", "wait for a migration at URI, after --incoming defer", self._incoming, waits=True
            ),
            "migrate_set_capability": _Entry(
                "capability state",
                "enable or disable a migration capability",
                self._set_capability,
                waits=True,
            ),
            "migrate_set_parameter": _Entry(
                "parameter value", "set a migration parameter", self._set_parameter
            ),
            "quit|q": _Entry("", "quit the emulator", lambda _: control.quit("host-qmp-quit")),
            "resolve_doubt": _Entry(
                "[uri]",
                "ask a migration's destination whether it runs the guest",
                lambda uri: f"{migration.resolve_doubt(uri or None)}\n",
                waits=True,
            ),
            "stop|s": _Entry("", "stop emulation", lambda _: machine.stop()),
            "xp": _Entry("/fmt addr", "physical memory dump starting at 'addr'", self._xp),
        }
        self._infos: Mapping[str, _Entry] = {
            "cpus": _Entry("", "show infos for each CPU", self._info_cpus),
            "kvm": _Entry(
                "", "show whether the host's own CPU runs the guest", lambda _: f"kvm support: {enabled}\n"
            ),
            "migrate": _Entry(
                "", "show migration status", lambda _: migration_report(migration.info().to_qmp())
            ),
            "migrate_capabilities": _Entry(
                "", "show current migration capabilities", self._info_capabilities
            ),
            "migrate_parameters": _Entry(
                "", "show current migration parameters", lambda _: parameter_lines(migration.parameters())
            ),
            "name": _Entry("", "show the current VM name", lambda _: f"{name}\n" if name else ""),
            "network": _Entry("", "show what each network card has carried", self._info_network),
            "registers": _Entry("[-a]", "show the CPU registers (-a: of all CPUs)", self._info_registers),
            "stage2": _Entry("", "show statistics of stage 2 and the dirty log", self._info_stage2),
            "status": _Entry("", "show the current VM status", self._info_status),
            "version": _Entry(
                "",
                "show the version",
                lambda _: f"{version['major']}.{version['minor']}.{version['micro']} {protocol.PACKAGE}\n",
            ),
        }

    def execute(self, line: str, *, cpu: int | None = None, newline: str = "\n") -> str:
        """Run one line.

        :param cpu: the default CPU of this line
        :return: the answer, each of its lines ended by `newline`; nothing else in it is for a terminal to obey
        """
        too_long = len(line) > MAX_LINE
        text = (
            f"the line has more than {MAX_LINE} characters\n"
            if too_long
            else self._execute(line.strip(), cpu)
        )
        return printable(text, lines=True).replace("\n", newline)

    def _execute(self, line: str, cpu: int | None) -> str:
        name, _, rest = line.partition(" ")
        if name.startswith("xp/"):
            name, rest = "xp", line[2:]
        if not name:
            return ""
        found = _find(self._commands, name)
        if found is None:
            return f"unknown command: '{name[:80]}'\n"
        key, entry = found
        try:
            with self._control.command(waits=entry.waits):
                if entry.waits:
                    return entry.answer(key, rest.strip())
                before, self.cpu = self.cpu, self.cpu if cpu is None else cpu
                try:
                    return entry.answer(key, rest.strip())
                finally:
                    if cpu is not None:
                        self.cpu = before
        except UsageError as error:
            return f'{error.desc}\nTry "help {name}" for more information\n'
        except QmpError as error:
            return f"Error: {error.desc}\n"

    # -- machine ---------------------------------------------------------------------------------------------

    def _cont(self, rest: str) -> None:
        force = rest == "-f"
        _no_more("" if force else rest, "cont|c")
        self._control.machine.cont(force=force)

    def _set_cpu(self, rest: str) -> None:
        number = int(rest) if rest.isascii() and rest.isdigit() and len(rest) <= 9 else None
        if number is None or number >= self._control.machine.config.smp:
            raise UsageError(f"cpu: {rest[:40]!r} is not the index of a CPU")
        self.cpu = number

    def _xp(self, rest: str) -> str:
        try:
            layout = DumpFormat()
            if rest.startswith("/"):
                text, _, rest = rest.partition(" ")
                layout = DumpFormat.parse(text[1:])
            address = parse_expression(rest)
        except ValueError as error:
            raise UsageError(str(error)) from error
        return dump(address, self._control.machine.read_physical(address, layout.total_bytes), layout)

    def _help(self, rest: str) -> str:
        names = rest.split()
        if not names:
            return _listing(self._commands)
        if names[0] == "info" and len(names) > 1:
            found = _find(self._infos, names[1])
            return f"info {found[1].line(found[0])}\n" if found else f"unknown command: '{rest[:80]}'\n"
        if names[0] == "info":
            return _listing(self._infos, "info ")
        found = _find(self._commands, names[0])
        return f"{found[1].line(found[0])}\n" if found else f"unknown command: '{names[0][:80]}'\n"

    # -- migration -------------------------------------------------------------------------------------------

    def _migrate(self, rest: str) -> str:
        words = rest.split(maxsplit=1)
        detach = False
        while words and words[0].startswith("-"):
            if words[0] != "-d":
                raise UsageError(f"migrate: unsupported option {words[0][:40]}")
            detach = True
            words = words[1].split(maxsplit=1) if len(words) > 1 else []
        if not words:
            raise UsageError("migrate: string expected")
        self._control.migration.migrate(" ".join(words))
        if detach:
            return ""
        if not self._foreground:
            return "terminal does not allow synchronous migration, continuing detached\n"
        info = self._control.migration.wait()
        return f"Error: {info.error}\n" if info.error else f"migration {info.status.value}\n"

    def _incoming(self, rest: str) -> None:
        if not rest:
            raise UsageError("migrate_incoming: string expected")
        self._control.start_incoming(rest)

    def _set_capability(self, rest: str) -> None:
        words = rest.split()
        if len(words) != 2:
            raise UsageError("migrate_set_capability: a capability and its state expected")
        if words[1] not in ("on", "off"):
            raise UsageError("Expected 'on' or 'off'")
        if words[0] not in self._control.migration.capabilities():
            raise QmpError(f"invalid parameter value: {words[0][:80]}")
        self._control.migration.set_capabilities({words[0]: words[1] == "on"})

    def _set_parameter(self, rest: str) -> None:
        name, _, text = rest.partition(" ")
        if not name:
            raise UsageError("migrate_set_parameter: string expected")
        self._control.migration.set_parameters({name: parse_parameter(name, text.strip())})

    # -- info ------------------------------------------------------------------------------------------------

    def _info(self, rest: str) -> str:
        name, _, arguments = rest.partition(" ")
        if not name:
            return _listing(self._infos, "info ")
        found = _find(self._infos, name)
        if found is None:
            return f"unknown command: 'info {name[:80]}'\n"
        return found[1].answer(found[0], arguments.strip())

    def _info_cpus(self, _: str) -> str:
        return "".join(
            f"{'*' if cpu.index == self.cpu else ' '} CPU #{cpu.index}: thread_id={cpu.thread_id}\n"
            for cpu in self._control.machine.cpus()
        )

    def _info_capabilities(self, _: str) -> str:
        states = self._control.migration.capabilities()
        return "".join(f"{name}: {'on' if state else 'off'}\n" for name, state in states.items())

    def _info_network(self, _: str) -> str:
        cards = self._control.machine.network_counts()
        return "".join(
            f"{tap}: {', '.join(f'{name} {count}' for name, count in counts.items())}\n"
            for tap, counts in cards.items()
        )

    def _info_registers(self, rest: str) -> str:
        if rest not in ("", "-a"):
            raise UsageError("registers: extraneous characters at the end of line")
        cpus = range(self._control.machine.config.smp) if rest else [self.cpu]
        return "".join(f"\nCPU#{cpu}\n{self._control.machine.registers(cpu).rstrip()}\n" for cpu in cpus)

    def _info_stage2(self, _: str) -> str:
        statistics = self._control.machine.statistics()
        width = max(map(len, statistics), default=0)
        return "".join(f"{name.replace('_', ' '):<{width}}  {value}\n" for name, value in statistics.items())

    def _info_status(self, _: str) -> str:
        state = self._control.machine.run_state.value
        error = self._control.machine.error
        shown = state if state in ("running", "paused") else f"paused ({state})"
        return f"VM status: {shown}\n" + (f"{error}\n" if error else "")


def _find(entries: Mapping[str, _Entry], name: str) -> tuple[str, _Entry] | None:
    return next(((key, entry) for key, entry in entries.items() if name in key.split("|")), None)


def _listing(entries: Mapping[str, _Entry], prefix: str = "") -> str:
    return "".join(f"{prefix}{entry.line(name)}\n" for name, entry in entries.items())


def _no_more(rest: str, name: str) -> None:
    if rest:
        raise UsageError(f"{name}: extraneous characters at the end of line")
