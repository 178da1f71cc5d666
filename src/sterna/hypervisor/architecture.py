"""Which architectures guests may have: what all else asks of one that is known by its name."""

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sterna.registry import Registry
from sterna.stage2.format import DescriptorFormat

DEFAULT = "armv7"


@dataclass(frozen=True)
class Cpus:
    """The CPUs of an architecture that one kind of hypervisor has.

    :ivar models: their names, the default first, and what each is compatible with in a device tree
    :ivar code: where the class is that has them, as `module:name`
    """

    models: Mapping[str, str]
    code: str

    def load(self) -> Any:
        """The class: its libraries may take their time to load, or be missing."""
        return pkgutil.resolve_name(self.code)


@dataclass(frozen=True)
class Architecture:
    """An architecture. Its module imports none of the code that it names.

    :ivar name: as a user says it
    :ivar target: QEMU's name of it (SysEmuTarget)
    :ivar elf: bits and machine of the executables that its CPUs run
    :ivar platform: where its `sterna.machine.platform.Platform` is, as `module:name`
    :ivar kvm_host: the hosts whose KVM has such guests, by what `uname -m` says there
    :ivar kvm: CPUs on KVM, a `KvmVm`
    :ivar stage2: the tables of stage 2 that we make for emulated CPUs; None where there are none yet
    :ivar emulated: emulated CPUs, an `Engine`; None where there are none
    """

    name: str
    target: str
    elf: tuple[int, str]
    platform: str
    kvm_host: str
    kvm: Cpus
    stage2: DescriptorFormat | None = None
    emulated: Cpus | None = None


ARCHITECTURES: Registry[Architecture] = Registry(
    "sterna.architectures", "sterna.arch", "ARCHITECTURE", left_out=("arm",)
)
