"""How the test bed fails.

::

    BedError                the bed cannot do it; one line for the user
      +-- Unsupported       this machine lacks what is needed: a reason to skip, not to fail
      +-- WaitedTooLong     something did not come true in time
      +-- VmError           a VM did not start, ended, or refused a command
      +-- ScenarioError     a scenario file is wrong: the user's
"""


class BedError(Exception):
    """The test bed cannot do what is asked; one line."""


class Unsupported(BedError):
    """This machine, or the VM under test, lacks something; the text says what, and which package has it."""


class WaitedTooLong(BedError):
    """Something did not come true in time; the text says what."""


class VmError(BedError):
    """A VM did not start, ended, or refused a command."""


class ScenarioError(BedError):
    """A scenario file is wrong; the text names file, key and what was expected."""
