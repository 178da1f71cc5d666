"""The kinds of VM that scenarios can test, by name: a module for each, which has it as `KIND`."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sterna.registry import Registry

if TYPE_CHECKING:
    from sterna.testbed.kind import KindOptions, VmKind

VM_KINDS: "Registry[Callable[[KindOptions], VmKind]]" = Registry(
    "sterna.vm_kinds", "sterna.testbed.kinds", "KIND"
)
