"""The QMP commands: QEMU 7.2's names, arguments and results (qapi/*.json), and a few of our own (`x-sterna-`)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import msgspec

from sterna.host.newfile import NewFile
from sterna.monitor import protocol
from sterna.monitor.control import Control
from sterna.monitor.hmp import HumanMonitor
from sterna.monitor.protocol import QmpError, convert_arguments

_SAVE_CHUNK = 1 << 20
_MOST_CELLS = 1 << 16


class Arguments(msgspec.Struct, forbid_unknown_fields=True, rename="kebab", frozen=True):
    """A command's arguments; a command without any takes this."""


class MigrateArguments(Arguments, frozen=True):
    uri: str
    blk: bool = False
    inc: bool = False
    detach: bool = True
    resume: bool = False


class ContArguments(Arguments, frozen=True):
    """:ivar x_sterna_force: the guest is to run even if nobody knows that it does not run elsewhere"""

    x_sterna_force: bool = False


class UriArguments(Arguments, frozen=True):
    uri: str


class DoubtArguments(Arguments, frozen=True):
    """:ivar uri: where the destination can be asked, when that is not where the guest was sent"""

    uri: str | None = None


class CapabilityStatus(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """:ivar state: None takes back what was said of it"""

    capability: str
    state: bool | None


class CapabilitiesArguments(Arguments, frozen=True):
    capabilities: list[CapabilityStatus]


class HumanArguments(Arguments, frozen=True):
    command_line: str
    cpu_index: int | None = None


class SaveArguments(Arguments, frozen=True):
    val: int
    size: int
    filename: str


class RangeArguments(Arguments, frozen=True):
    val: int
    size: int


class HeatArguments(Arguments, frozen=True):
    cells: int = 1024


@dataclass(frozen=True)
class Command:
    """One QMP command.

    :ivar schema: its arguments; None hands them over as they are
    :ivar run: gives the answer; None stands for an empty one
    :ivar waits: as in `Control.command`
    """

    name: str
    schema: type[msgspec.Struct] | None
    run: Callable[[Any], Any]
    waits: bool = False


class Commands:
    """All commands, bound to what they control."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._human = HumanMonitor(control)
        self._commands = {command.name: command for command in self._declare()}

    def execute(self, name: str, arguments: dict[str, Any]) -> Any:
        """Run a command on the caller's thread.

        :return: the value of the answer's `return`
        :raise QmpError: When it is unknown, its arguments are wrong, or it fails.
        """
        command = self._commands.get(name)
        if command is None:
            raise QmpError(f"The command {name[:80]} has not been found", "CommandNotFound")
        checked = arguments if command.schema is None else convert_arguments(arguments, command.schema)
        with self._control.command(waits=command.waits):
            answer = command.run(checked)
        return {} if answer is None else answer

    def _declare(self) -> list[Command]:
        none = Arguments
        control, machine, migration = self._control, self._control.machine, self._control.migration
        version = {"qemu": protocol.QEMU_VERSION, "package": protocol.PACKAGE}
        name = machine.config.name
        on_kvm = machine.config.accel == "kvm"
        return [
            Command("query-version", none, lambda _: version),
            Command("query-commands", none, self._query_commands),
            Command("query-name", none, lambda _: {"name": name} if name else {}),
            Command("query-uuid", none, lambda _: {"UUID": str(machine.config.uuid or UUID(int=0))}),
            Command("query-kvm", none, lambda _: {"enabled": on_kvm, "present": on_kvm}),
            Command("query-status", none, self._query_status),
            Command("query-cpus-fast", none, self._query_cpus),
            Command("stop", none, lambda _: machine.stop()),
            Command("cont", ContArguments, lambda given: machine.cont(force=given.x_sterna_force)),
            Command("quit", none, lambda _: control.quit("host-qmp-quit")),
            Command("migrate", MigrateArguments, self._migrate, waits=True),
            Command(
                "migrate-incoming", UriArguments, lambda given: control.start_incoming(given.uri), waits=True
            ),
            Command("migrate_cancel", none, lambda _: migration.cancel()),
            Command("x-sterna-resolve-doubt", DoubtArguments, self._resolve_doubt, waits=True),
            Command("query-migrate", none, lambda _: migration.info().to_qmp()),
            Command("migrate-set-capabilities", CapabilitiesArguments, self._set_capabilities, waits=True),
            Command("query-migrate-capabilities", none, self._query_capabilities),
            Command(
                "x-sterna-query-asked-capabilities", none, lambda _: sorted(migration.asked_capabilities())
            ),
            Command("migrate-set-parameters", None, self._set_parameters),
            Command("query-migrate-parameters", none, lambda _: migration.parameters()),
            Command("human-monitor-command", HumanArguments, self._human_command, waits=True),
            Command("pmemsave", SaveArguments, self._pmemsave, waits=True),
            Command("x-sterna-query-stage2", none, self._query_stage2),
            Command("x-sterna-query-page-heat", HeatArguments, self._query_page_heat),
            Command("x-sterna-unmap", RangeArguments, lambda given: machine.unmap(given.val, given.size)),
            Command("x-sterna-age", RangeArguments, self._age),
        ]

    # -- the machine -----------------------------------------------------------------------------------------

    def _query_commands(self, _: Arguments) -> Any:
        return [{"name": name} for name in ("qmp_capabilities", *self._commands)]

    def _query_status(self, _: Arguments) -> Any:
        machine = self._control.machine
        answer = {
            "status": machine.run_state.value,
            "singlestep": False,
            "running": self._control.running,
        }
        if machine.error:
            answer["x-sterna-error"] = machine.error
        return answer

    def _query_cpus(self, _: Arguments) -> Any:
        return [
            {
                "cpu-index": cpu.index,
                "qom-path": f"/machine/unattached/device[{cpu.index}]",
                "thread-id": cpu.thread_id,
                "props": {"core-id": cpu.index, "thread-id": 0, "socket-id": 0, "cluster-id": 0},
                "target": self._control.machine.config.target,
            }
            for cpu in self._control.machine.cpus()
        ]

    def _query_stage2(self, _: Arguments) -> Any:
        return {name.replace("_", "-"): int(n) for name, n in self._control.machine.statistics().items()}

    def _age(self, arguments: RangeArguments) -> Any:
        return {"young": self._control.machine.age(arguments.val, arguments.size)}

    def _pmemsave(self, arguments: SaveArguments) -> None:
        if arguments.size < 0 or arguments.val < 0:
            raise QmpError("Parameter 'size' and 'val' must not be negative")
        # The memory is checked before the file is touched.
        machine, end = self._control.machine, arguments.val + arguments.size
        for edge in {arguments.val, end - 1} if arguments.size else ():
            machine.read_physical(edge, 1)
        try:
            file = NewFile(arguments.filename, private=True)
        except OSError as error:
            raise QmpError(f"Could not open '{arguments.filename[:200]}': {error.strerror}") from error
        with file:
            for at in range(arguments.val, end, _SAVE_CHUNK):
                if self._control.closing.is_set():
                    raise QmpError(
                        f"Could not write '{arguments.filename[:200]}': the machine is being closed"
                    )
                data = machine.read_physical(at, min(_SAVE_CHUNK, end - at))
                self._complete(arguments.filename, file.write, data)
            self._complete(arguments.filename, file.commit)

    @staticmethod
    def _complete(name: str, step: Callable[..., None], *data: bytes) -> None:
        try:
            step(*data)
        except OSError as error:
            raise QmpError(f"Could not write '{name[:200]}': {error.strerror}") from error

    def _human_command(self, arguments: HumanArguments) -> Any:
        if (
            arguments.cpu_index is not None
            and not 0 <= arguments.cpu_index < self._control.machine.config.smp
        ):
            raise QmpError("Parameter 'cpu-index' expects a CPU number")
        return self._human.execute(arguments.command_line, cpu=arguments.cpu_index, newline="\r\n")

    # -- migration -------------------------------------------------------------------------------------------

    def _migrate(self, arguments: MigrateArguments) -> None:
        if arguments.blk or arguments.inc:
            raise QmpError("Parameter 'blk' is not supported: there are no disks to migrate")
        self._control.migration.migrate(arguments.uri, resume=arguments.resume)

    def _resolve_doubt(self, arguments: DoubtArguments) -> Any:
        return {"found": self._control.migration.resolve_doubt(arguments.uri)}

    def _query_page_heat(self, arguments: HeatArguments) -> Any:
        if not 1 <= arguments.cells <= _MOST_CELLS:
            raise QmpError(f"Parameter 'cells' expects a number from 1 to {_MOST_CELLS}")
        return [
            {name.replace("_", "-"): value for name, value in vars(heat).items()}
            for heat in self._control.migration.page_heat(arguments.cells)
        ]

    def _set_capabilities(self, arguments: CapabilitiesArguments) -> None:
        known = self._control.migration.capabilities()
        for status in arguments.capabilities:
            if status.capability not in known:
                raise QmpError(f"Parameter 'capability' does not accept value '{status.capability[:80]}'")
        self._control.migration.set_capabilities({s.capability: s.state for s in arguments.capabilities})

    def _query_capabilities(self, _: Arguments) -> Any:
        states = self._control.migration.capabilities()
        return [{"capability": name, "state": state} for name, state in states.items()]

    def _set_parameters(self, arguments: dict[str, Any]) -> None:
        known = self._control.migration.parameters()
        for name in arguments:
            if name not in known:
                raise QmpError(f"Parameter '{name[:80]}' is unexpected")
        self._control.migration.set_parameters(arguments)
