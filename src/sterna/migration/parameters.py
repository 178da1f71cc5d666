"""Migration parameters and capabilities, with QEMU 7.2's names, types, defaults and limits (its QMP schema,
migration.json).

Parameters that only matter to features this program does not have are stored and returned, as QEMU does while
the capability is off. Enabling a capability that is not implemented is an error. Names with the prefix
`x-sterna-` are our own.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from sterna.migration.errors import ParameterError
from sterna.migration.policy import Policy
from sterna.registry import Registry
from sterna.stream.multifd.format import Compression

Value = int | bool | str

MAX_DOWNTIME_LIMIT_MS = 2_000_000
_SIZE_MAX = (1 << 64) - 1


class Verify(Enum):
    """Whether both ends compare digests of guest RAM before the destination starts."""

    AUTO = "auto"
    """When the other end can (the default)."""
    OFF = "off"
    ON = "on"
    """Always: fail against a peer that cannot, and append the digests to one-way streams."""


@dataclass(frozen=True)
class PolicyType:
    """What `x-sterna-policy` names.

    :ivar make: makes one migration's
    :ivar own: whether it may choose XBZRLE, and to begin with it, of which the user has not said whether it is on
    :ivar argument: the parameter, a whole number, that VALUE sets in ``--policy NAME:VALUE``; empty when there is none
    :ivar unit: what that counts
    """

    name: str
    make: Callable[["Parameters"], Policy]
    own: bool = True
    argument: str = ""
    unit: str = ""


POLICIES: Registry[PolicyType] = Registry("sterna.policies", "sterna.migration.policies", "POLICY")


@dataclass(frozen=True)
class Spec:
    """One parameter: its default, and what it accepts."""

    default: Value
    low: int = 0
    high: int = _SIZE_MAX
    choices: tuple[str, ...] | Registry[PolicyType] = ()
    power_of_two: bool = False

    def check(self, name: str, value: object) -> Value:
        """
        :raise ParameterError: When the type or the value is wrong; it names the parameter and what it takes.
        """
        if isinstance(self.default, bool):
            if not isinstance(value, bool):
                raise ParameterError(f"parameter {name!r} takes a boolean, not {value!r:.50}")
            return value
        if isinstance(self.default, str):
            if not isinstance(value, str):
                raise ParameterError(f"parameter {name!r} takes a string, not {value!r:.50}")
            if self.choices and value not in self.choices:
                raise ParameterError(f"parameter {name!r} takes {', '.join(self.choices)}; not {value!r:.50}")
            return value
        if not isinstance(value, int) or isinstance(value, bool):
            raise ParameterError(f"parameter {name!r} takes an integer, not {value!r:.50}")
        if not self.low <= value <= self.high:
            raise ParameterError(f"parameter {name!r} takes {self.low} to {self.high}; {value} is outside")
        if self.power_of_two and value & (value - 1):
            raise ParameterError(f"parameter {name!r} takes a power of two; {value} is none")
        return value


PARAMETERS: Mapping[str, Spec] = {
    "announce-initial": Spec(50, high=100_000),
    "announce-max": Spec(550, high=100_000),
    "announce-rounds": Spec(5, high=1000),
    "announce-step": Spec(100, low=1, high=10_000),
    "compress-level": Spec(1, high=9),
    "compress-threads": Spec(8, low=1, high=255),
    "compress-wait-thread": Spec(True),
    "decompress-threads": Spec(2, low=1, high=255),
    "throttle-trigger-threshold": Spec(50, low=1, high=100),
    "cpu-throttle-initial": Spec(20, low=1, high=99),
    "cpu-throttle-increment": Spec(10, low=1, high=99),
    "cpu-throttle-tailslow": Spec(False),
    "tls-creds": Spec(""),
    "tls-hostname": Spec(""),
    "tls-authz": Spec(""),
    "max-bandwidth": Spec(128 << 20),
    "downtime-limit": Spec(300, high=MAX_DOWNTIME_LIMIT_MS),
    "x-checkpoint-delay": Spec(20_000, high=(1 << 32) - 1),
    "block-incremental": Spec(False),
    "multifd-channels": Spec(2, low=1, high=255),
    "multifd-compression": Spec("none", choices=("none", "zlib", "zstd")),
    "multifd-zlib-level": Spec(1, high=9),
    "multifd-zstd-level": Spec(1, high=20),
    "xbzrle-cache-size": Spec(64 << 20, low=4096, power_of_two=True),
    "max-postcopy-bandwidth": Spec(0),
    "max-cpu-throttle": Spec(99, low=1, high=99),
    "x-sterna-audit": Spec(False),
    "x-sterna-verify": Spec("auto", choices=tuple(verify.value for verify in Verify)),
    "x-sterna-policy": Spec("adaptive", choices=POLICIES),
    "x-sterna-deadline": Spec(60, low=1, high=1_000_000),
    "x-sterna-max-throttle": Spec(99, high=99),
    "x-sterna-doubt-timeout": Spec(10_000, high=3_600_000),
    "x-sterna-ignore-sections": Spec(""),
    "x-sterna-switchover-timeout": Spec(30_000, low=1, high=3_600_000),
}
"""Every parameter. `max-bandwidth` and `max-postcopy-bandwidth` are bytes/s (0: unlimited). `xbzrle-cache-size` is bytes; a
migration takes it when it begins. In milliseconds
are `downtime-limit`, `x-sterna-doubt-timeout` (how long to ask a destination whether it runs the guest, or to wait for its word)
and `x-sterna-switchover-timeout` (how long the guest may be stopped before the switchover is given up). `x-sterna-deadline` is
the policy `deadline`'s, in seconds; `x-sterna-max-throttle` what policies of our own may take of the guest's time, in percent.
`x-sterna-ignore-sections` names sections and RAM blocks, separated by commas, of which an incoming guest does not need what
has no place here. `x-sterna-audit` has the source compare RAM with what it has sent after every harvest
(`sterna.migration.audit`).
"""

CAPABILITIES: Mapping[str, bool] = {
    "xbzrle": True,
    "rdma-pin-all": False,
    "auto-converge": True,
    "zero-blocks": False,
    "compress": False,
    "events": True,
    "postcopy-ram": False,
    "x-colo": False,
    "release-ram": False,
    "block": False,
    "return-path": True,
    "pause-before-switchover": False,
    "multifd": True,
    "dirty-bitmaps": False,
    "postcopy-blocktime": False,
    "late-block-activate": False,
    "x-ignore-shared": False,
    "validate-uuid": True,
    "background-snapshot": False,
    "zero-copy-send": False,
    "postcopy-preempt": False,
}
"""Every capability, and whether it can be enabled. `return-path` is opened wherever the channel works both
ways. With `validate-uuid` the stream says which machine it is of.
"""


@dataclass
class Parameters:
    """The settings of one machine's migrations. All are off, or at their defaults, to begin with.

    :ivar on_change: called after each change; a running migration follows its limits
    """

    on_change: Callable[[], None] = lambda: None
    _values: dict[str, Value] = field(
        default_factory=lambda: {name: spec.default for name, spec in PARAMETERS.items()}
    )
    _capabilities: dict[str, bool] = field(default_factory=lambda: dict.fromkeys(CAPABILITIES, False))
    _asked: dict[str, bool] = field(default_factory=dict)

    def set(self, changes: Mapping[str, object]) -> None:
        """Change parameters: all of them or, when one is wrong, none.

        :raise ParameterError: When a name is unknown, or a value of the wrong type or outside its limits.
        """
        checked: dict[str, Value] = {}
        for name, value in changes.items():
            if name not in PARAMETERS:
                raise ParameterError(f"unknown migration parameter {name!r:.50}")
            checked[name] = PARAMETERS[name].check(name, value)
        merged = {**self._values, **checked}
        if int(merged["cpu-throttle-initial"]) > int(merged["max-cpu-throttle"]):
            raise ParameterError("parameter 'max-cpu-throttle' must not be below 'cpu-throttle-initial'")
        self._values = merged
        self.on_change()

    def set_capabilities(self, changes: Mapping[str, bool | None]) -> None:
        """Switch capabilities: all of them or, when one cannot be, none.

        :param changes: None takes back what was said of a capability: it is off, or left to the policy again
        :raise ParameterError: When a name is unknown, or the capability is to be enabled and is not
            implemented.
        """
        for name, state in changes.items():
            if name not in CAPABILITIES:
                raise ParameterError(f"unknown migration capability {name!r:.50}")
            if state is not None and not isinstance(state, bool):
                raise ParameterError(f"capability {name!r} takes a boolean, not {state!r:.50}")
            if state and not CAPABILITIES[name]:
                raise ParameterError(f"capability {name!r} is not implemented; it can only be off")
        said = {name: state for name, state in changes.items() if state is not None}
        self._capabilities = {**self._capabilities, **dict.fromkeys(changes, False), **said}
        self._asked = {name: state for name, state in self._asked.items() if name not in changes} | said

    def values(self) -> dict[str, Value]:
        """All parameters, in QMP's order."""
        return dict(self._values)

    def number(self, name: str) -> int:
        """A parameter that is one, by its name; of a boolean, 1 or 0."""
        return int(self._values[name])

    def seconds(self, name: str) -> float:
        """One that counts milliseconds."""
        return self.number(name) / 1000

    def has(self, capability: str) -> bool:
        """Whether a capability is on."""
        return self._capabilities[capability]

    def capabilities(self) -> dict[str, bool]:
        """All capabilities, in QMP's order."""
        return dict(self._capabilities)

    @property
    def asked_capabilities(self) -> frozenset[str]:
        """Those of which the user has said whether they are on; the policy may choose others."""
        return frozenset(self._asked)

    @property
    def announce_delays(self) -> list[float]:
        """Seconds before each time that an arrived guest's networks are told of it; the first is at once."""
        initial, step, most, rounds = (
            self.number(f"announce-{name}") for name in ("initial", "step", "max", "rounds")
        )
        later = (min(initial + number * step, most) / 1000 for number in range(rounds - 1))
        return [0.0, *later] if rounds else []

    @property
    def policy(self) -> PolicyType:
        """How a migration converges (`sterna.migration.policy`)."""
        return POLICIES.get(str(self._values["x-sterna-policy"]))

    @property
    def most_throttle(self) -> int:
        """Percent of its time that a policy of our own may take from the guest. What the user said of `auto-converge` holds."""
        match self._asked.get("auto-converge"):
            case None:
                return self.number("x-sterna-max-throttle")
            case asked:
                return self.number("max-cpu-throttle") if asked else 0

    @property
    def may_choose_xbzrle(self) -> bool:
        """Whether XBZRLE is left to the policy: the user has not said."""
        return "xbzrle" not in self._asked and self.policy.own

    @property
    def multifd_channels(self) -> int:
        """Both ends must agree; 0 while multifd is off."""
        return self.number("multifd-channels") if self.has("multifd") else 0

    @property
    def multifd_compression(self) -> Compression:
        """How pages are coded on multifd channels."""
        return Compression(self._values["multifd-compression"])

    @property
    def multifd_level(self) -> int:
        """Level of that compression; 0 without."""
        if self.multifd_compression is Compression.NONE:
            return 0
        return self.number(f"multifd-{self.multifd_compression.value}-level")

    @property
    def verify(self) -> Verify:
        return Verify(self._values["x-sterna-verify"])

    @property
    def ignored_sections(self) -> frozenset[str]:
        """Names of sections and RAM blocks that an incoming guest does not need."""
        names = str(self._values["x-sterna-ignore-sections"]).split(",")
        return frozenset(name for name in map(str.strip, names) if name)
