"""The QMP commands: QEMU 7.2's names, arguments and results (qapi/*.json), and a few of our own (`x-sterna-`)."""

import inspect
from collections.abc import Callable
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


class CapabilityStatus(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """:ivar state: None takes back what was said of it"""

    capability: str
    state: bool | None


class Command:
    """One QMP command, which is a function: its parameters are the command's arguments, by names with hyphens. One that takes
    any keywords is given the arguments as they are.

    :param run: gives the answer; None stands for an empty one
    :param waits: as in `Control.command`
    """

    def __init__(self, name: str, run: Callable[..., Any], *, waits: bool = False) -> None:
        self.name = name
        self.run = run
        self.waits = waits
        parameters = inspect.signature(run).parameters.values()
        self._takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters)
        fields = [
            (one.name, one.annotation)
            if one.default is one.empty
            else (one.name, one.annotation, one.default)
            for one in parameters
        ]
        self._schema = msgspec.defstruct("Arguments", fields, forbid_unknown_fields=True, rename="kebab")

    def keywords(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """What to call the function with.

        :raise QmpError: When an argument is unknown, missing or of the wrong type.
        """
        if self._takes_any:
            return arguments
        return msgspec.structs.asdict(convert_arguments(arguments, self._schema))


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
        keywords = command.keywords(arguments)
        with self._control.command(waits=command.waits):
            answer = command.run(**keywords)
        return {} if answer is None else answer

    def _declare(self) -> list[Command]:
        control, machine, migration = self._control, self._control.machine, self._control.migration
        version = {"qemu": protocol.QEMU_VERSION, "package": protocol.PACKAGE}
        name = machine.config.name
        on_kvm = machine.config.accel == "kvm"
        return [
            Command("query-version", lambda: version),
            Command("query-commands", self._query_commands),
            Command("query-name", lambda: {"name": name} if name else {}),
            Command("query-uuid", lambda: {"UUID": str(machine.config.uuid or UUID(int=0))}),
            Command("query-kvm", lambda: {"enabled": on_kvm, "present": on_kvm}),
            Command("query-status", self._query_status),
            Command("query-cpus-fast", self._query_cpus),
            Command("stop", machine.stop),
            Command("cont", self._cont),
            Command("quit", lambda: control.quit("host-qmp-quit")),
            Command("migrate", self._migrate, waits=True),
            Command("migrate-incoming", control.start_incoming, waits=True),
            Command("migrate_cancel", migration.cancel),
            Command("x-sterna-resolve-doubt", self._resolve_doubt, waits=True),
            Command("query-migrate", lambda: migration.info().to_qmp()),
            Command("migrate-set-capabilities", self._set_capabilities, waits=True),
            Command("query-migrate-capabilities", self._query_capabilities),
            Command("x-sterna-query-asked-capabilities", lambda: sorted(migration.asked_capabilities())),
            Command("migrate-set-parameters", self._set_parameters),
            Command("query-migrate-parameters", migration.parameters),
            Command("human-monitor-command", self._human_command, waits=True),
            Command("pmemsave", self._pmemsave, waits=True),
            Command("x-sterna-query-stage2", self._query_stage2),
            Command("x-sterna-query-page-heat", self._query_page_heat),
            Command("x-sterna-unmap", self._unmap),
            Command("x-sterna-age", self._age),
        ]

    # -- the machine -----------------------------------------------------------------------------------------

    def _query_commands(self) -> Any:
        return [{"name": name} for name in ("qmp_capabilities", *self._commands)]

    def _query_status(self) -> Any:
        machine = self._control.machine
        answer = {
            "status": machine.run_state.value,
            "singlestep": False,
            "running": self._control.running,
        }
        if machine.error:
            answer["x-sterna-error"] = machine.error
        return answer

    def _query_cpus(self) -> Any:
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

    def _query_stage2(self) -> Any:
        return {name.replace("_", "-"): int(n) for name, n in self._control.machine.statistics().items()}

    def _cont(self, x_sterna_force: bool = False) -> None:
        """:param x_sterna_force: the guest is to run even if nobody knows that it does not run elsewhere"""
        self._control.machine.cont(force=x_sterna_force)

    def _unmap(self, val: int, size: int) -> None:
        self._control.machine.unmap(val, size)

    def _age(self, val: int, size: int) -> Any:
        return {"young": self._control.machine.age(val, size)}

    def _pmemsave(self, val: int, size: int, filename: str) -> None:
        if size < 0 or val < 0:
            raise QmpError("Parameter 'size' and 'val' must not be negative")
        # The memory is checked before the file is touched.
        machine, end = self._control.machine, val + size
        for edge in {val, end - 1} if size else ():
            machine.read_physical(edge, 1)
        try:
            file = NewFile(filename, private=True)
        except OSError as error:
            raise QmpError(f"Could not open '{filename[:200]}': {error.strerror}") from error
        with file:
            for at in range(val, end, _SAVE_CHUNK):
                if self._control.closing.is_set():
                    raise QmpError(f"Could not write '{filename[:200]}': the machine is being closed")
                data = machine.read_physical(at, min(_SAVE_CHUNK, end - at))
                self._complete(filename, file.write, data)
            self._complete(filename, file.commit)

    @staticmethod
    def _complete(name: str, step: Callable[..., None], *data: bytes) -> None:
        try:
            step(*data)
        except OSError as error:
            raise QmpError(f"Could not write '{name[:200]}': {error.strerror}") from error

    def _human_command(self, command_line: str, cpu_index: int | None = None) -> Any:
        if cpu_index is not None and not 0 <= cpu_index < self._control.machine.config.smp:
            raise QmpError("Parameter 'cpu-index' expects a CPU number")
        return self._human.execute(command_line, cpu=cpu_index, newline="\r\n")

    # -- migration -------------------------------------------------------------------------------------------

    def _migrate(
        self, uri: str, blk: bool = False, inc: bool = False, detach: bool = True, resume: bool = False
    ) -> None:
        if blk or inc:
            raise QmpError("Parameter 'blk' is not supported: there are no disks to migrate")
        self._control.migration.migrate(uri, resume=resume)

    def _resolve_doubt(self, uri: str | None = None) -> Any:
        """:param uri: where the destination can be asked, when that is not where the guest was sent"""
        return {"found": self._control.migration.resolve_doubt(uri)}

    def _query_page_heat(self, cells: int = 1024) -> Any:
        if not 1 <= cells <= _MOST_CELLS:
            raise QmpError(f"Parameter 'cells' expects a number from 1 to {_MOST_CELLS}")
        return [
            {name.replace("_", "-"): value for name, value in vars(heat_map).items()}
            for heat_map in self._control.migration.heat_maps(cells)
        ]

    def _set_capabilities(self, capabilities: list[CapabilityStatus]) -> None:
        known = self._control.migration.capabilities()
        for status in capabilities:
            if status.capability not in known:
                raise QmpError(f"Parameter 'capability' does not accept value '{status.capability[:80]}'")
        self._control.migration.set_capabilities({s.capability: s.state for s in capabilities})

    def _query_capabilities(self) -> Any:
        states = self._control.migration.capabilities()
        return [{"capability": name, "state": state} for name, state in states.items()]

    def _set_parameters(self, /, **parameters: Any) -> None:
        known = self._control.migration.parameters()
        for name in parameters:
            if name not in known:
                raise QmpError(f"Parameter '{name[:80]}' is unexpected")
        self._control.migration.set_parameters(parameters)
