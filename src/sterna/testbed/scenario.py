"""Scenario files: TOML, short and declarative. What they do is a procedure, what has to hold are checks.

::

    title = "..."                   what it shows, in one line
    [vm] [network] [migration]      `sterna.testbed.settings`
    [procedure] kind = "migrate"    `sterna.testbed.procedures`
    [[check]]   kind = "content"    `sterna.testbed.checks`
    [reduced.TABLE]                 what is different in a short run
    [for.KIND.TABLE]                what is different for a kind of VM
    [reduced.for.KIND.TABLE]        and in its short runs

Tables of a variant are laid over those of the file. Keys are strict: one that is not known is an error.
"""

import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_args

import msgspec

from sterna.host.messages import Flaw, flaw
from sterna.testbed.checks import Check
from sterna.testbed.errors import ScenarioError
from sterna.testbed.kinds import VM_KINDS
from sterna.testbed.procedures import Procedure
from sterna.testbed.settings import MigrationSettings, NetworkSettings, ScenarioTable, VmSettings

_MAX_BYTES = 1 << 20
_REDUCED, _FOR = "reduced", "for"

SEED = ("migrate", "many", "date", "reclaim", "checksum", "timer", "failover", "ssh", "cancel")
"""Those of the document that this project comes from."""
ORDER = (*SEED, "pingpong", "faults")
"""All, in the order in which they are listed and run."""
GROUPS = {"seed": SEED, "all": ORDER}
"""Names for several."""


class Scenario(ScenarioTable, frozen=True):
    """One scenario, variants applied."""

    title: str
    procedure: Procedure
    vm: VmSettings = VmSettings()
    network: NetworkSettings = NetworkSettings()
    migration: MigrationSettings = MigrationSettings()
    check: list[Check] = msgspec.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.check:
            raise ValueError("a scenario needs at least one [[check]]")


@dataclass(frozen=True)
class ScenarioFile:
    """A scenario as its file has it, all of its variants checked.

    :ivar source: where it was read, for people
    """

    name: str
    source: str
    tables: Mapping[str, Any]

    def scenario(self, kind: str, *, reduced: bool = False) -> Scenario:
        """What to run on a kind of VM.

        :raise ScenarioError: When this variant is wrong.
        """
        tables = dict(self.tables)
        variants = [tables.pop(_FOR, {}).get(kind, {})]
        short = tables.pop(_REDUCED, {})
        if reduced:
            short = dict(short)
            own = short.pop(_FOR, {}).get(kind, {})
            variants += [short, own]
        for variant in variants:
            tables = _lay_over(tables, variant)
        try:
            return msgspec.convert(tables, Scenario, strict=True)
        except msgspec.ValidationError as error:
            raise ScenarioError(f"{self.source}: {_explain(flaw(error))}") from error


def parse(name: str, source: str, text: str) -> ScenarioFile:
    """
    :raise ScenarioError: When it is not TOML, has unknown keys, wrong types, or values that cannot be, in any variant.
    """
    try:
        tables = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ScenarioError(f"{source}: not TOML: {error}") from error
    if not isinstance(tables.get(_REDUCED, {}), dict):
        raise ScenarioError(f"{source}: {_REDUCED}: expected a table")
    _check_kinds(source, _FOR, tables.get(_FOR, {}))
    _check_kinds(source, f"{_REDUCED}.{_FOR}", tables.get(_REDUCED, {}).get(_FOR, {}))
    file = ScenarioFile(name, source, tables)
    for kind in VM_KINDS:
        for reduced in (False, True):
            file.scenario(kind, reduced=reduced)
    return file


def read(path: Path) -> ScenarioFile:
    """A user's own file.

    :raise ScenarioError: When it cannot be read, or as `parse`.
    """
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):
            raise ScenarioError(
                f"{path}: it is no regular file, so no scenario"
            )  # a pipe or a device may never end
        if found.st_size > _MAX_BYTES:
            raise ScenarioError(f"{path}: too large for a scenario")
        return parse(path.stem, str(path), path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"{path}: {getattr(error, 'strerror', None) or error}") from error


def find(name: str) -> ScenarioFile:
    """A scenario that ships with sterna, or a file: what contains a slash or ends in .toml.

    :raise ScenarioError: When there is none.
    """
    if "/" in name or name.endswith(".toml"):
        return read(Path(name))
    if name not in names():
        raise ScenarioError(
            f"no scenario {name[:80]!r}; there are {', '.join(names())}, and {' and '.join(GROUPS)} for several"
        )
    entry = _folder() / f"{name}.toml"
    return parse(name, f"{name}.toml", entry.read_text(encoding="utf-8"))


def find_all(name: str) -> list[ScenarioFile]:
    """The scenarios of a group, or the one of that name, as `find`.

    :raise ScenarioError: When there is none.
    """
    if name not in GROUPS:
        return [find(name)]
    return [find(member) for member in names() if name == "all" or member in GROUPS[name]]


def names() -> list[str]:
    """Those that ship, in order."""
    present = {Path(entry.name).stem for entry in _folder().iterdir() if entry.name.endswith(".toml")}
    return [name for name in ORDER if name in present] + sorted(present - set(ORDER))


def _folder() -> Any:
    return resources.files("sterna.testbed") / "scenarios"


def _check_kinds(source: str, where: str, variants: object) -> None:
    if not isinstance(variants, dict):
        raise ScenarioError(f"{source}: {where}: expected a table")
    for kind, variant in variants.items():
        if kind not in VM_KINDS:
            raise ScenarioError(
                f"{source}: {where}.{kind}: no such kind of VM; there are {', '.join(VM_KINDS)}"
            )
        if not isinstance(variant, dict):
            raise ScenarioError(f"{source}: {where}.{kind}: expected a table")


def _lay_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Tables are merged; anything else replaces what was there."""
    result = dict(below)
    for key, value in above.items():
        old = result.get(key)
        result[key] = _lay_over(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return result


def _explain(flaw: Flaw) -> str:
    """What is wrong with the key first: ``vm.smp: Expected `int`, got `str```."""
    if flaw.unknown is not None:
        return f"{flaw.unknown}: unknown key"
    reason = flaw.reason
    if reason.startswith("Invalid value") and flaw.place.endswith("kind"):
        known: object = Procedure if flaw.place.startswith("procedure") else Check
        reason += f"; there are {', '.join(sorted(one.__struct_config__.tag for one in get_args(known)))}"
    return f"{flaw.place}: {reason}" if flaw.place else reason
