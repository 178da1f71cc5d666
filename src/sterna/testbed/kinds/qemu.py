"""QEMU with sterna's guest programs."""

import time
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

from sterna.boards.virt import BOARD as VIRT
from sterna.guests.catalog import find
from sterna.launch.command import qemu_arguments
from sterna.launch.host import Host
from sterna.launch.process import QemuProcess, SharedRam, VmProcess
from sterna.launch.qemu import Qemu, find_qemu
from sterna.machine.config import MachineConfig
from sterna.testbed.errors import BedError
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.kind import VmKind, checked_arguments
from sterna.testbed.network import GuestNic
from sterna.testbed.settings import VmSettings

_PROBE_SECONDS = 30
_SOUND_QEMU = 9
"""The first QEMU whose TLBs learn that the migration has read and cleared the dirty bitmap 64 pages at a time. Before, a guest
on TCG goes on writing through entries that do not mark pages. RAM blocks that are no multiple of 64 pages are read page by page,
which is sound in all."""
_ODD_BYTES = 8192
"""What QEMU rounds sizes of RAM up to (-m), and no multiple of 64 pages."""
_TRICKLE = 1 << 16
"""Bytes per second: too few to end."""
_POLL_SECONDS = 0.01


class QemuKind(VmKind):
    """`qemu-system-arm` with the same guest programs."""

    name = "qemu"
    verifies = False
    waits_again = False
    counts_pages = False

    _odd_bytes = 0

    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        version = self._qemu.version
        if int(version.partition(".")[0]) < _SOUND_QEMU:
            self._odd_bytes = _ODD_BYTES
            self.note = (
                f"QEMU {version} loses writes of guests on TCG while they migrate, where RAM is a multiple of 256 KiB (QEMU "
                f"{_SOUND_QEMU}.0 does not): guests have {_ODD_BYTES >> 10} KiB more here, except where a scenario sets "
                "exact-memory to find that"
            )

    def settle(self, vm: VmProcess) -> None:
        """The first reading of a bitmap page by page, when all pages are marked, holds up the guest for long: have it done."""
        if not self._odd_bytes:
            return
        vm.command("migrate-set-parameters", **{"max-bandwidth": _TRICKLE, "downtime-limit": 1})
        vm.command("migrate", uri="exec:cat >/dev/null")
        _wait_status(vm, "active")
        vm.command("migrate_cancel")
        _wait_status(vm, "cancelled")

    def guest(self, settings: VmSettings) -> ObservedGuest:
        return ObservedGuest(int(VIRT.ram_base), self._memory_bytes(settings))

    def _memory_bytes(self, settings: VmSettings) -> int:
        """As the VM has it."""
        return settings.memory_bytes + (0 if settings.exact_memory else self._odd_bytes)

    def _kernel(self, settings: VmSettings, nic: GuestNic | None) -> Mapping[str, str]:
        arguments = checked_arguments(settings, nic, VIRT)
        return {"kernel": str(find(settings.program, VIRT.name)), "append": arguments}

    def _config(
        self, name: str, settings: VmSettings, nic: GuestNic | None = None, **chosen: Any
    ) -> MachineConfig:
        return super()._config(name, settings, nic, memory_bytes=self._memory_bytes(settings), **chosen)

    def _start_vm(
        self, name: str, host: Host, settings: VmSettings, config: MachineConfig, **line: Any
    ) -> VmProcess:
        shared = settings.shared_ram and "incoming" not in line
        ram = SharedRam(VIRT.ram_name, config.memory_bytes) if shared else None
        arguments = qemu_arguments(config, ram=ram, extra=self.options.arguments, **line)
        return QemuProcess(name, self._binary(), arguments, host, ram)

    @cached_property
    def _qemu(self) -> Qemu:
        return find_qemu(self.options.qemu)

    def _binary(self) -> str:
        return self._qemu.path


def _wait_status(vm: VmProcess, wanted: str) -> None:
    """Wait until the VM's migration is so far."""
    deadline = time.monotonic() + _PROBE_SECONDS
    while (status := vm.command("query-migrate")["status"]) != wanted:
        if status in ("failed", "completed") or time.monotonic() > deadline:
            raise BedError(f"a trial migration of the {vm.name} is {status}, not {wanted}")
        time.sleep(_POLL_SECONDS)


KIND = QemuKind
