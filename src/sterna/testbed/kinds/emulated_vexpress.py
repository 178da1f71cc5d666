"""sterna on the emulated CPU, on ARM's Versatile Express: the RAM elsewhere, no PSCI, another machine type in the stream."""

from typing import Any

from sterna.machine.board import BOARDS, Board
from sterna.machine.config import MachineConfig
from sterna.testbed.kind import KindOptions
from sterna.testbed.network import GuestNic
from sterna.testbed.settings import VmSettings
from sterna.testbed.sternakind import SternaKind

_BOARD = "vexpress-a15"


class VexpressKind(SternaKind):
    """`sterna run --machine vexpress-a15`."""

    def __init__(self, options: KindOptions) -> None:
        super().__init__("emulated", options)
        self.name = "emulated-vexpress"

    def _board(self) -> Board:
        return BOARDS.get(_BOARD)

    def _config(
        self, name: str, settings: VmSettings, nic: GuestNic | None = None, **chosen: Any
    ) -> MachineConfig:
        return super()._config(name, settings, nic, machine=_BOARD, **chosen)


KIND = VexpressKind
