"""``python -m sterna.cli.broken``: the command line, with accelerators that have a fault each. Not a command: the test bed starts
its VMs by it when it is itself under test (`sterna testbed run --breakage`).
"""

from sterna.cli import main
from sterna.testing.breakages import register_all

if __name__ == "__main__":
    register_all()
    main()
