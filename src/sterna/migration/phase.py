"""The phases that a migration goes through, at the source and at the destination."""

from abc import ABC, abstractmethod
from contextlib import ExitStack

from sterna.ownership import OwnershipState


class Phase(ABC):
    """One phase of a migration. It gets what it needs from the phase before, and passes on what the next one needs."""

    fault = ""
    """What it means when `undo` fails, for the user."""

    @abstractmethod
    def run(self, stack: ExitStack) -> "Phase | None":
        """
        :param stack: gets what is to be closed when the last phase is over, or one has failed
        :return: the phase that follows, None after the last
        """

    def undo(self, state: OwnershipState) -> None:  # noqa: B027, few phases have something to undo
        """The migration has failed: take back what the phase has done to the guest. Phases undo in the order in which they began.

        :param state: whose the guest is
        """


def run_phases(first: Phase, begun: list[Phase]) -> None:
    """Run a phase, and those that follow it.

    :param begun: gets each before it runs
    """
    with ExitStack() as stack:
        phase: Phase | None = first
        while phase is not None:
            begun.append(phase)
            phase = phase.run(stack)
