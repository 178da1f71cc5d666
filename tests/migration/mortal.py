"""A destination process that dies at a given point: ``python -m tests.migration.mortal PAGES METHOD``."""

import os
import sys

from tests.migration.double import DoubleGuest

from sterna.migration.controller import MigrationController


def die(*_: object) -> int:
    os._exit(1)


def main() -> None:
    with DoubleGuest(int(sys.argv[1]), running=False) as guest, MigrationController(guest) as controller:
        setattr(guest, sys.argv[2], die)
        print(controller.incoming("tcp:127.0.0.1:0"), flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
