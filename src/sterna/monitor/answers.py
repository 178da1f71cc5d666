"""What this program uses of a VM's answers, a sterna's or a QEMU's, so that `QmpClient.query` can check it. Members that are not
named here may hold anything.
"""

from typing import Annotated, TypedDict

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Amount = Annotated[float, msgspec.Meta(ge=0, le=2.0**64)]
Word = Annotated[str, msgspec.Meta(max_length=80)]
Text = Annotated[str, msgspec.Meta(max_length=1 << 12)]


class RunState(TypedDict):
    """Of query-status."""

    status: Word


class CapabilityState(TypedDict):
    """One of query-migrate-capabilities."""

    capability: Word
    state: bool


_Limits = TypedDict("_Limits", {"downtime-limit": Count})
_Rates = TypedDict("_Rates", {"max-bandwidth": Count, "max-postcopy-bandwidth": Count}, total=False)


class MigrationParameters(_Limits, _Rates):
    """Of query-migrate-parameters."""


Ram = TypedDict(
    "Ram",
    {
        "transferred": Count,
        "remaining": Count,
        "total": Count,
        "duplicate": Count,
        "normal": Count,
        "dirty-pages-rate": Count,
        "mbps": Amount,
        "dirty-sync-count": Count,
        "page-size": Count,
    },
    total=False,
)


class Pass(TypedDict):
    """What a sterna says of a pass."""

    pages: Count
    dirty_pages_after: Count


Own = TypedDict(
    "Own",
    {
        "uri": str,  # with a command of the user's, as long as that is
        "peer": Text,
        "verified": bool | None,
        "ram-digest-source": Word,
        "ram-digest-destination": Word,
        "total-ms": Amount,
        "downtime-ms": Amount | None,
        "least-downtime-ms": Amount | None,
        "predicted-downtime-ms": Amount | None,
        "predicted-over-real": Amount | None,
        "passes": list[Pass],
        "in-doubt": bool,
        "saved-pages": Count,
        "policy": Word,
        "verdict": Text,
        "clock-note": Text,
    },
    total=False,
)
"""What a sterna says under ``x-sterna``."""


class Xbzrle(TypedDict, total=False):
    pages: Count
    overflow: Count


Migration = TypedDict(
    "Migration",
    {
        "status": Word,
        "error-desc": Text,
        "total-time": Amount,
        "setup-time": Amount,
        "downtime": Amount,
        "expected-downtime": Amount,
        "cpu-throttle-percentage": Count,
        "ram": Ram,
        "xbzrle-cache": Xbzrle,
        "x-sterna": Own,
    },
    total=False,
)
"""Of query-migrate; empty when there was no migration."""


class BegunMigration(Migration):
    """The same once there is one."""

    status: Word  # type: ignore[misc]  # it is there now
