"""The settings of one migration: applied while it runs, and as they were afterwards."""

import difflib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from sterna.cli.errors import UsageError
from sterna.cli.migrationoptions import bandwidth_value, duration_value, policy_values
from sterna.host.units import format_rate
from sterna.migration.parameters import CAPABILITIES, PARAMETERS
from sterna.monitor.answers import CapabilityState, MigrationParameters, Word
from sterna.monitor.client import ConnectionLost, QmpClient
from sterna.monitor.hmpvalues import parse_parameter, parse_switch
from sterna.monitor.protocol import QmpError

_SHOWN = ("max-bandwidth", "downtime-limit", "x-sterna-policy")
"""Parameters that decide most, shown beside those that the user sets and those that are not at their defaults."""
_RATES = ("max-bandwidth", "max-postcopy-bandwidth")


@dataclass
class WantedSettings:
    """What a migration is to run with, by QEMU's names; what is not named stays as it is."""

    parameters: dict[str, Any] = field(default_factory=dict)
    capabilities: dict[str, bool] = field(default_factory=dict)


@dataclass
class AppliedSettings:
    """What a VM is set to.

    :ivar keep: the settings stay when the body of `applied` ends without an error
    """

    parameters: dict[str, Any]
    capabilities: dict[str, bool]
    changed: frozenset[str]
    keep: bool = False

    def text(self) -> str:
        """In one line."""
        names = [name for name in _SHOWN if name in self.parameters]
        others = {name for name in self.changed if name in self.parameters}
        others |= {n for n, v in self.parameters.items() if n in PARAMETERS and v != PARAMETERS[n].default}
        names += sorted(others - set(names))
        told = [f"{name} {_value(name, self.parameters[name])}" for name in names]
        on = [name for name, state in self.capabilities.items() if state]
        off = sorted(name for name in self.changed if self.capabilities.get(name) is False)
        return ", ".join([*told, *(f"{name} on" for name in on), *(f"{name} off" for name in off)])


def _value(name: str, value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if name in _RATES:
        return format_rate(value) if value else "unlimited"
    return f"{value} ms" if name == "downtime-limit" else str(value)


def asked_settings(given: Sequence[str]) -> WantedSettings:
    """What `--set` names, checked before anything is started.

    :raise UsageError: When it is nothing that can be set.
    """
    settings = WantedSettings()
    for setting in given:
        name, equals, text = setting.partition("=")
        if not equals:
            raise UsageError(f"--set {setting[:80]!r}: expected NAME=VALUE")
        try:
            if name in CAPABILITIES:
                settings.capabilities[name] = parse_switch(name, text)
            elif name in PARAMETERS:
                settings.parameters[name] = parse_parameter(name, text, default_unit="")
            else:
                alike = difflib.get_close_matches(name[:80], [*PARAMETERS, *CAPABILITIES], 1)
                told = "".join(f"; there is {one!r}" for one in alike)
                raise UsageError(f"--set: no migration parameter or capability {name[:80]!r}{told}")
        except QmpError as error:
            raise UsageError(f"--set {setting[:80]!r}: {error.desc}") from error
    return settings


def asked_parameters(
    bandwidth: str | None,
    downtime_limit: str | None,
    policy: str | None,
    verify: bool | None,
    audit: bool | None,
) -> dict[str, Any]:
    """The migration parameters that options of their own set, checked before anything is started."""
    parameters: dict[str, Any] = {}
    if bandwidth is not None:
        parameters["max-bandwidth"] = bandwidth_value(bandwidth)
    if downtime_limit is not None:
        parameters["downtime-limit"] = duration_value(downtime_limit)
    if policy is not None:
        parameters |= policy_values(policy)
    if verify is not None:
        parameters["x-sterna-verify"] = "on" if verify else "off"
    if audit is not None:
        parameters["x-sterna-audit"] = audit
    return parameters


@contextmanager
def applied(client: QmpClient, settings: WantedSettings) -> Iterator[AppliedSettings]:
    """The settings are in force in the body of the `with` statement. However that ends, they are set back, as far as the VM
    is still there and lets them: one whose migration goes on keeps its capabilities. What another client has changed meanwhile
    stays as that client wants it.

    :raise QmpError: When the VM refuses them.
    :raise ConnectionLost: When it is gone, or does not answer as a VM does.
    """
    before, capabilities_before = _settings(client)
    # A sterna tells what its user said of a capability from what it may choose itself.
    own = "x-sterna-policy" in before
    asked = client.query("x-sterna-query-asked-capabilities", list[Word]) if own else capabilities_before
    tried, tried_capabilities = dict(settings.parameters), dict(settings.capabilities)
    keep = False
    try:
        if tried:
            client.execute("migrate-set-parameters", tried)
        if tried_capabilities:
            states = [{"capability": name, "state": on} for name, on in tried_capabilities.items()]
            client.execute("migrate-set-capabilities", {"capabilities": states})
        applied_settings = AppliedSettings(
            *_settings(client), frozenset(tried) | frozenset(tried_capabilities)
        )
        tried = {name: applied_settings.parameters.get(name, value) for name, value in tried.items()}
        yield applied_settings
        keep = applied_settings.keep
    finally:
        with suppress(QmpError, ConnectionLost):
            if not keep:
                now, capabilities_now = _settings(client)
                old_parameters = {
                    name: before[name]
                    for name, value in tried.items()
                    if name in before and now.get(name) == value
                }
                old_capabilities = [
                    {"capability": name, "state": capabilities_before[name] if name in asked else None}
                    for name, state in tried_capabilities.items()
                    if name in capabilities_before and capabilities_now.get(name) is state
                ]
                with suppress(QmpError):
                    if old_parameters:
                        client.execute("migrate-set-parameters", old_parameters)
                if old_capabilities:
                    client.execute("migrate-set-capabilities", {"capabilities": old_capabilities})


def _settings(client: QmpClient) -> tuple[dict[str, Any], dict[str, bool]]:
    """What a VM is set to now: parameters and capabilities."""
    states = client.query("query-migrate-capabilities", list[CapabilityState])
    parameters: dict[str, Any] = {**client.query("query-migrate-parameters", MigrationParameters)}
    return parameters, {one["capability"]: one["state"] for one in states}
