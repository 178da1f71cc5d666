"""How starting and driving virtual machines fails.

::

    LaunchError             it cannot be done; one line for the user
      +-- Unsupported       this machine lacks what is needed: a reason to skip, not to fail
      +-- WaitedTooLong     something did not come true in time
      +-- VmError           a VM did not start, ended, or refused a command
"""

from sterna.errors import Error


class LaunchError(Error):
    """A virtual machine, or what it needs, cannot be had as asked; one line."""


class Unsupported(LaunchError):
    """This machine, or the VM, lacks something; the text says what, and which package has it."""


class WaitedTooLong(LaunchError):
    """Something did not come true in time; the text says what."""


class VmError(LaunchError):
    """A VM did not start, ended, or refused a command."""
