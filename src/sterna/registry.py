"""What can be added by name: hypervisors, boards, policies, kinds of VM.

What sterna brings along of a kind are the modules of one package, each of which has one thing under the same attribute: adding a
file adds one. Other distributions have theirs as entry points of the kind's group, which are code that the user has installed.
Nothing is imported before it is asked for by name, and no name comes from a stream.
"""

import importlib
import importlib.util
import pkgutil
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Generic, TypeVar, cast

from sterna.errors import Error

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

T = TypeVar("T")


class UnknownName(Error):
    """Nothing is registered under a name; the text says what is."""


class PluginError(Error):
    """Another distribution's entry point cannot be loaded, or two have the same name."""


class Registry(Generic[T]):
    """All of one kind, by name. A built-in one goes before an entry point of the same name.

    :param group: of entry points
    :param package: whose modules are the built-in ones. The underscores of a module are hyphens of a name, but for those of a
        folder; a module that begins with one is none
    :param attribute: that the modules have
    :param left_out: other modules of the package that are none
    """

    def __init__(self, group: str, package: str, attribute: str, left_out: Sequence[str] = ()) -> None:
        self._group = group
        self._package = package
        self._attribute = attribute
        self._left_out = left_out
        self._items: dict[str, T] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(dict.fromkeys((*self._modules, *self._items, *(one.name for one in self._entry_points))))

    def __contains__(self, name: object) -> bool:
        # Entry points are looked at last: that costs more than the rest of a command's start.
        known = name in self._items or name in self._modules
        return known or any(one.name == name for one in self._entry_points)

    def get(self, name: str) -> T:
        """What has that name.

        :raise UnknownName: When nothing has.
        :raise PluginError: When it is an entry point that cannot be loaded.
        """
        if name not in self._items:
            self._items[name] = self._load(name)
        return self._items[name]

    def add(self, name: str, item: T) -> None:
        """Register something in this process, in the place of its namesake."""
        self._items[name] = item

    def _load(self, name: str) -> T:
        if name in self._modules:
            module = importlib.import_module(f"{self._package}.{self._modules[name]}")
            return cast(T, getattr(module, self._attribute))
        found = [one for one in self._entry_points if one.name == name]
        if not found:
            raise UnknownName(f"{self._group}: there is no {name[:80]!r}; there are {', '.join(self)}")
        if len(found) > 1:
            values = " and ".join(sorted(one.value for one in found))
            raise PluginError(f"{self._group}: {name} is {values}; one of the packages must go")
        try:
            return cast(T, found[0].load())
        except Exception as error:  # whatever the other distribution's code raises
            raise PluginError(
                f"{self._group}: {name} ({found[0].value}) cannot be loaded: {error}"
            ) from error

    @cached_property
    def _modules(self) -> dict[str, str]:
        """Names of the built-in ones, and their modules'."""
        spec = importlib.util.find_spec(self._package)
        assert spec is not None
        return {
            one.name if one.ispkg else one.name.replace("_", "-"): one.name
            for one in pkgutil.iter_modules(spec.submodule_search_locations)
            if not one.name.startswith("_") and one.name not in self._left_out
        }

    @cached_property
    def _entry_points(self) -> "tuple[EntryPoint, ...]":
        from importlib.metadata import entry_points

        return tuple(entry_points(group=self._group))
