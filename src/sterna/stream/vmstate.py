"""Device state on the wire: vmstate fields and their descriptions."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class DeviceState:
    """The state of one device: what a section of the stream carries.

    :ivar fields: values by field name; lists for arrays, dictionaries for structures
    """

    name: str
    instance_id: int
    version: int
    fields: dict[str, Any]
    subsections: "tuple[DeviceState, ...]" = field(default=())
