"""What tests of a hypervisor, and of migrations, can use: guests without a hypervisor, hypervisors with faults, and a suite that
every dirty log must pass (`sterna.testing.conformance`).
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sterna.testing.broken import BREAKAGES, broken_vm
    from sterna.testing.conformance.backends import Backend, Program
    from sterna.testing.conformance.guest import ConformanceGuest
    from sterna.testing.flush import RecordingFlush
    from sterna.testing.guest import DoubleGuest

__all__ = [
    "BREAKAGES",
    "Backend",
    "ConformanceGuest",
    "DoubleGuest",
    "Program",
    "RecordingFlush",
    "broken_vm",
]

_HOMES = {
    "BREAKAGES": "broken",
    "Backend": "conformance.backends",
    "ConformanceGuest": "conformance.guest",
    "DoubleGuest": "guest",
    "Program": "conformance.backends",
    "RecordingFlush": "flush",
    "broken_vm": "broken",
}
"""The module of each name: it is imported when the name is first used, so that a double needs no emulated CPU."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
