"""Paths on the command line."""

from typing import Any

import click


class NamedPath(click.Path):
    """A path that names something. An empty one is refused: to Python it is the current directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not value:
            self.fail("the path is empty", param, ctx)
        return super().convert(value, param, ctx)
