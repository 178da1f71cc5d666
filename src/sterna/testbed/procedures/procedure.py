"""What every procedure has."""

import msgspec

from sterna.testbed.bed import ScenarioContext
from sterna.testbed.evidence import Evidence


class BaseProcedure(
    msgspec.Struct, forbid_unknown_fields=True, rename="kebab", tag_field="kind", frozen=True
):
    """A procedure as a scenario file declares it."""

    def run(self, context: ScenarioContext, evidence: Evidence) -> None:
        """Do it. What is seen goes into `evidence` at once: it is kept when the procedure fails half way.

        :raise BedError: When something other than the VM under test fails.
        """
        raise NotImplementedError
