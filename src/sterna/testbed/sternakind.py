"""The kinds of VM that are `sterna run`."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from sterna.hypervisor import interface as hypervisor
from sterna.hypervisor.accelerator import ACCELERATORS, check_arch
from sterna.launch.command import sterna_arguments
from sterna.launch.errors import Unsupported, VmError
from sterna.launch.host import LOCAL, Host
from sterna.launch.process import SternaProcess, VmProcess
from sterna.machine.board import Board
from sterna.machine.config import MachineConfig
from sterna.testbed.guest import ObservedGuest
from sterna.testbed.kind import KindOptions, VmKind, checked_arguments
from sterna.testbed.network import GuestNic
from sterna.testbed.settings import VmSettings


class SternaKind(VmKind):
    """`sterna run`."""

    verifies = True
    waits_again = True
    counts_pages = True
    # Its own policy would slow the guest, and send what changed in a page, until it fits.
    endless = MappingProxyType({"downtime-limit": 0, "x-sterna-policy": "fixed"})

    def __init__(self, accel: str, options: KindOptions) -> None:
        super().__init__(options)
        self.name = self.accel = accel
        self._start: Callable[[str, Sequence[str], Host], VmProcess] = SternaProcess
        self._machine_accel = accel
        if options.breakage:
            from sterna.testing.breakages import LAUNCHER, accel_name

            self._start = partial(SternaProcess, module=LAUNCHER)
            self._machine_accel = accel_name(options.breakage)
            self.note = f"the emulated hypervisor has a fault: {options.breakage}"

    def check(self, say: Callable[[str], None] = lambda text: None) -> None:
        device = ACCELERATORS.get(self.accel).device
        if not device:
            try:
                check_arch(self.accel, self._board().arch)
            except hypervisor.Unsupported as error:
                raise Unsupported(str(error)) from error
            return
        if not os.path.exists(device):
            raise Unsupported(f"this machine has no {device}")
        settings = VmSettings(memory="16M", program="clock")
        config = self._config("trial", settings, kernel="clock", paused=True)
        with self._start_vm("trial", LOCAL, settings, config) as vm:
            try:
                vm.ready()
            except VmError as error:
                raise Unsupported(str(error)) from error

    def guest(self, settings: VmSettings) -> ObservedGuest:
        board = self._board()
        return ObservedGuest(int(board.ram_base), settings.memory_bytes, board.written_by_host)

    def _board(self) -> Board:
        """The one that this hypervisor runs by default."""
        return MachineConfig(accel=self.accel).board

    def _kernel(self, settings: VmSettings, nic: GuestNic | None) -> Mapping[str, str]:
        return {"kernel": settings.program, "append": checked_arguments(settings, nic, self._board())}

    def _config(
        self, name: str, settings: VmSettings, nic: GuestNic | None = None, **chosen: Any
    ) -> MachineConfig:
        return super()._config(name, settings, nic, accel=self.accel, **chosen)

    def _start_vm(
        self, name: str, host: Host, settings: VmSettings, config: MachineConfig, **line: Any
    ) -> VmProcess:
        accel, extra = self._machine_accel, self.options.arguments
        return self._start(name, sterna_arguments(config, accel=accel, extra=extra, **line), host)
