"""The source of a migration.

Its phases: set up (connect, header, greeting, RAM blocks, dirty logging on); precopy (all pages first, then what the dirty log
says was written since, until the rest is estimated to fit the downtime limit); switchover (the guest stops, the last pages and
the devices follow); handover (the guest changes hands).

Whatever goes wrong, and whenever: logging is off, the channel closed, and the guest runs if it ran before,
unless the destination runs it or cannot be asked. What goes wrong after the guest has changed hands is logged, and the
migration has succeeded.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from sterna.host.printable import describe
from sterna.migration.channels import uri as uris
from sterna.migration.errors import InDoubt, MigrationError, Unsynced
from sterna.migration.phase import Phase, run_phases
from sterna.migration.source.context import SourceContext
from sterna.migration.source.setup import SetUp
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import OwnershipState

log = logging.getLogger(__name__)

_QUESTION_SECONDS = 5.0
"""How long the user's own question to the destination may take."""

_HANDED_OVER = frozenset({OwnershipState.AWAY, OwnershipState.SAVED, OwnershipState.HANDED_ON})
"""Once it has come to that, nothing that fails here is a failure of the migration."""


@dataclass
class Source:
    """One outgoing migration. `run` does all of it on the caller's thread; `cancel` may come from any other.

    The progress must be in setup, so that the migration is visible before `run` gets going.
    """

    context: SourceContext

    def cancel(self) -> None:
        """Cancel. Once COMMIT is on its way the destination decides, and the migration may still complete; who cancels while its
        word is waited for in doubt waits no longer.
        """
        self.context.progress.cancelling()
        self.context.outcome_query.stop_waiting()  # first: what follows may begin that wait
        self.context.cancellation.set()

    def abandon(self, reason: str) -> None:
        """It will not be run: nothing was done, and nothing is left of it."""
        self.context.progress.enter(MigrationStatus.FAILED, error=reason)
        self.context.ends.close()

    @property
    def resolvable(self) -> bool:
        """Whether it ended in doubt, and still is."""
        hold = self.context.guest.ownership.hold
        return hold.state is OwnershipState.IN_DOUBT and hold.migration == self.context.migration_id.bytes

    def resolve_doubt(self, uri: uris.Uri | None) -> str:
        """After the migration: ask again who runs the guest. It stays stopped here.

        :param uri: where the destination can be asked, when that is not where the guest was sent
        :return: what was found out, in one line
        :raise InDoubt: When nothing was.
        """
        try:
            self.context.outcome_query.resolve(_QUESTION_SECONDS, self.context.closing, uri)
        except InDoubt:
            raise
        except MigrationError as error:
            found = f"{error}: it is this machine's, and 'cont' runs it"
        else:
            runs = self.context.guest.ownership.state is OwnershipState.AWAY
            found = (
                "the guest runs at the destination"
                if runs
                else "the command has all of the guest, and may run it"
            )
            self.context.guest.migrated_away()
        self.context.outcome_query.stop_watching()
        self.context.progress.resolve(found)
        return found

    # -- outcomes --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Migrate; the outcome is in the progress."""
        begun: list[Phase] = []
        try:
            run_phases(SetUp(self.context), begun)
        except Exception as error:
            self._recover(error, begun)
        else:
            self._leave()
        finally:
            self.context.ends.close()

    def _leave(self) -> None:
        """The guest has changed hands: what fails from here on is told, and the migration has succeeded."""
        for step, fault in (
            (self.context.guest.migrated_away, "this machine cannot be left"),
            (self.context.logging.stop, SetUp.fault),
        ):
            try:
                step()
            except Exception as error:
                log.error("%s after the guest has left: %s", fault, describe(error))
        self.context.progress.enter(MigrationStatus.COMPLETED)

    def _recover(self, error: Exception, begun: Sequence[Phase]) -> None:
        """The migration failed: logging off; if the guest is still this machine's, it runs if it ran before."""
        context = self.context
        text, state = describe(error), context.guest.ownership.state
        if isinstance(error, Unsynced):
            text += "; the guest was saved, and stands still: 'cont' runs it"
        elif state in _HANDED_OVER:
            log.error("after the guest has left: %s", text)
            self._leave()
            return
        in_doubt = state is OwnershipState.IN_DOUBT
        if in_doubt and not isinstance(error, InDoubt):
            text += f"; {context.outcome_query.advice}"
        elif context.overdue and state is OwnershipState.OWNER:
            seconds = context.parameters.seconds("x-sterna-switchover-timeout")
            text = f"the destination did not take the stopped guest over within {seconds:.1f} s"
        for phase in begun:
            try:
                phase.undo(state)
            except Exception as worse:
                text += f"; and {phase.fault}: {worse}"
        if context.cancellation.is_set and not context.overdue and state is OwnershipState.OWNER:
            context.progress.cancelling()
            context.progress.enter(MigrationStatus.CANCELLED)
        else:
            context.progress.enter(MigrationStatus.FAILED, error=text, in_doubt=in_doubt)
