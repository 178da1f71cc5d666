from tests.migration.conftest import nothing_left_behind
from tests.stream.conftest import block

__all__ = ["block", "nothing_left_behind"]
