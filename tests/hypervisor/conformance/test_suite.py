"""The suite, on the hypervisors of this package."""

import importlib
import pkgutil

from sterna.testing import conformance
from sterna.testing.conformance.test_arguments import *  # noqa: F403
from sterna.testing.conformance.test_cases import *  # noqa: F403
from sterna.testing.conformance.test_differential import *  # noqa: F403
from sterna.testing.conformance.test_dirty_log import *  # noqa: F403
from sterna.testing.conformance.test_peek import *  # noqa: F403


def test_all_of_the_suite_is_here() -> None:
    """None of its modules was forgotten, and none has a test by a name that another has too."""
    for _, name, _ in pkgutil.iter_modules(conformance.__path__):
        module = importlib.import_module(f"{conformance.__name__}.{name}")
        own = {test: one for test, one in vars(module).items() if test.startswith("test_")}
        assert own.items() <= globals().items(), name
