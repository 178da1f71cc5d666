"""Python programs that this one starts: with this Python, and with nothing from the directory that the user is in, where
others may have put modules.
"""

import os
import sys
from pathlib import Path


def module_command(module: str, *arguments: str) -> list[str]:
    """The command that runs a module as a program. Modules of sterna's need `own_environment` as well."""
    return [sys.executable, "-P", "-m", module, *arguments]


def own_environment() -> dict[str, str]:
    """This program's environment, in which the modules of this very sterna are found, installed or not."""
    folder = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}
