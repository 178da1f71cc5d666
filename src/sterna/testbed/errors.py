"""How the test bed fails, beside the errors of launching (`sterna.launch.errors`).

::

    LaunchError
      +-- BedError            the bed cannot do it; one line for the user
            +-- ScenarioError a scenario file is wrong: the user's
"""

from sterna.launch.errors import LaunchError


class BedError(LaunchError):
    """The test bed cannot do what is asked; one line."""


class ScenarioError(BedError):
    """A scenario file is wrong; the text names file, key and what was expected."""
