"""What a source has and its destination has not: how a destination is asked about it, and how it is reported."""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """Whether a guest can do without the device that a section is of.

    :ivar harmless: it can: in this state the device does nothing to the guest
    :ivar reason: why, or which field has which value; one line
    """

    harmless: bool
    reason: str


class RamUse(Enum):
    """What the guest sees of a RAM block for which a destination has no place."""

    BLANK = "all zero, or erased"
    """It is mapped for the guest, which misses nothing as long as it holds nothing."""
    UNSEEN = "not mapped for the guest"
    """Whatever it holds, the guest does not see it."""


@dataclass(frozen=True)
class UnmatchedPart:
    """A section or a RAM block that a migration brought and that was left behind.

    :ivar kind: ``section`` or ``ram``
    :ivar nbytes: of the section's body, or of the RAM block
    :ivar digest: XXH3-64 of those bytes, 16 hexadecimal digits; of a RAM block, over the digests of its 2 MiB chunks
    :ivar ignored: the guest may miss it, but its user said that it does not matter
    :ivar reason: why it could be left behind
    :ivar fields: the section's values by field name; of buffers and arrays that are long, only how long they are
    """

    kind: str
    name: str
    instance_id: int
    nbytes: int
    digest: str
    ignored: bool
    reason: str
    fields: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        instance = f" (instance {self.instance_id})" if self.instance_id else ""
        return f"{'RAM block ' if self.kind == 'ram' else ''}{self.name}{instance}, {self.nbytes} bytes: {self.reason}"

    def to_qmp(self) -> dict[str, Any]:
        return {name.replace("_", "-"): value for name, value in vars(self).items()}
