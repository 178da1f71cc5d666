"""Dirty page logging and live migration for virtual machines.

What `__all__` names is for other programs. A name is fetched when it is first used, so `import sterna` itself costs nothing and
needs none of the libraries. All else is internal and may change from one version to the next.

- A hypervisor without a board: `open_vm` gives a `Vm`, with `MemorySlot`, `Vcpu` and a dirty log (`DirtyLogMode`) in KVM's terms.
- A machine: `Machine(MachineConfig(...))`; `Migrations(MigratableMachine(machine))` migrates it, by one of `POLICIES` or one of
  your own.
- A stream: `read_stream` says what is in it, `compare_streams` how two differ.
- A VM that runs elsewhere: `QmpClient.connect("unix:PATH")`; `start_sterna` starts one.

All that they raise on purpose is an `Error`.
"""

import importlib
from typing import TYPE_CHECKING, Any

from sterna.version import VERSION as __version__

if TYPE_CHECKING:
    from sterna.analysis.capture import survey_file as read_stream
    from sterna.analysis.compare import StreamDifference
    from sterna.analysis.compare import compare as compare_streams
    from sterna.analysis.findings import StreamSurvey
    from sterna.errors import Error
    from sterna.hypervisor.accelerator import open_vm
    from sterna.hypervisor.interface import (
        DirtyLogMode,
        Exit,
        ExitReason,
        HypervisorError,
        ManualProtect,
        MemorySlot,
        SlotFlags,
        Vcpu,
        Vm,
    )
    from sterna.launch.process import SternaProcess as start_sterna
    from sterna.launch.process import VmProcess
    from sterna.machine.config import ConfigError, MachineConfig
    from sterna.machine.machine import Machine
    from sterna.machine.migratable import MigratableMachine
    from sterna.machine.runstate import RunState
    from sterna.memory.bitmap import page_numbers
    from sterna.memory.ram import RamBlock
    from sterna.migration.controller import MigrationController as Migrations
    from sterna.migration.errors import MigrationError
    from sterna.migration.parameters import POLICIES, PolicyType
    from sterna.migration.policy import Continue, GiveUp, Policy, SwitchOver
    from sterna.migration.statistics import MigrationInfo, Pass
    from sterna.monitor.client import QmpClient
    from sterna.monitor.protocol import QmpError
    from sterna.stream.wire import StreamError

__all__ = [
    "POLICIES",
    "ConfigError",
    "Continue",
    "DirtyLogMode",
    "Error",
    "Exit",
    "ExitReason",
    "GiveUp",
    "HypervisorError",
    "Machine",
    "MachineConfig",
    "ManualProtect",
    "MemorySlot",
    "MigratableMachine",
    "MigrationError",
    "MigrationInfo",
    "Migrations",
    "Pass",
    "Policy",
    "PolicyType",
    "QmpClient",
    "QmpError",
    "RamBlock",
    "RunState",
    "SlotFlags",
    "StreamDifference",
    "StreamError",
    "StreamSurvey",
    "SwitchOver",
    "Vcpu",
    "Vm",
    "VmProcess",
    "__version__",
    "compare_streams",
    "open_vm",
    "page_numbers",
    "read_stream",
    "start_sterna",
]

_HOMES = {
    "POLICIES": "migration.parameters",
    "ConfigError": "machine.config",
    "Continue": "migration.policy",
    "DirtyLogMode": "hypervisor.interface",
    "Error": "errors",
    "Exit": "hypervisor.interface",
    "ExitReason": "hypervisor.interface",
    "GiveUp": "migration.policy",
    "HypervisorError": "hypervisor.interface",
    "Machine": "machine.machine",
    "MachineConfig": "machine.config",
    "ManualProtect": "hypervisor.interface",
    "MemorySlot": "hypervisor.interface",
    "MigratableMachine": "machine.migratable",
    "MigrationError": "migration.errors",
    "MigrationInfo": "migration.statistics",
    "Migrations": "migration.controller:MigrationController",
    "Pass": "migration.statistics",
    "Policy": "migration.policy",
    "PolicyType": "migration.parameters",
    "QmpClient": "monitor.client",
    "QmpError": "monitor.protocol",
    "RamBlock": "memory.ram",
    "RunState": "machine.runstate",
    "SlotFlags": "hypervisor.interface",
    "StreamDifference": "analysis.compare",
    "StreamError": "stream.wire",
    "StreamSurvey": "analysis.findings",
    "SwitchOver": "migration.policy",
    "Vcpu": "hypervisor.interface",
    "Vm": "hypervisor.interface",
    "VmProcess": "launch.process",
    "compare_streams": "analysis.compare:compare",
    "open_vm": "hypervisor.accelerator",
    "page_numbers": "memory.bitmap",
    "read_stream": "analysis.capture:survey_file",
    "start_sterna": "launch.process:SternaProcess",
}
"""Modules, and what a name is there when it is another."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sterna' has no attribute {name!r}")
    module, _, there = _HOMES[name].partition(":")
    item = getattr(importlib.import_module(f"sterna.{module}"), there or name)
    globals()[name] = item
    return item


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
