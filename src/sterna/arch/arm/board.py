"""What boards with ARM CPUs have besides."""

from dataclasses import dataclass

from sterna.machine.board import Board, Gic


@dataclass(frozen=True, kw_only=True)
class ArmBoard(Board):
    """A board with ARM CPUs.

    :ivar peripheral_base: what CBAR says
    :ivar psci: whether CPUs are started by PSCI (and all but the first are off until then); otherwise all start at once
    """

    gic: Gic
    peripheral_base: int
    psci: bool

    @property
    def secondaries_off(self) -> bool:
        """PSCI starts them."""
        return self.psci
