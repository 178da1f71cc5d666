"""What scenarios do, by the `kind` that their files name it with."""

from sterna.testbed.procedures.migrate import Migrate

Procedure = Migrate

__all__ = ["Procedure"]
