"""A destination process that dies or stops at a given point: ``python -m tests.migration.mortal PAGES METHOD [die|stop [URI]]``.

It prints where it waits, and ``running`` once its guest runs.
"""

import os
import signal
import sys
import threading
from typing import Any

from sterna.migration.controller import MigrationController
from sterna.migration.statistics import MigrationStatus
from sterna.testing.guest import DoubleGuest


def main() -> None:
    pages, method, how, uri = [*sys.argv[1:], *["die", "tcp:127.0.0.1:0"][len(sys.argv) - 3 :]]
    with DoubleGuest(int(pages), running=False) as guest, MigrationController(guest) as controller:
        original = getattr(guest, method)

        def act(*arguments: object) -> Any:
            if how == "die":
                os._exit(1)
            # To this thread, so that it is the one that stops at once.
            signal.pthread_kill(threading.get_ident(), signal.SIGSTOP)
            return original(*arguments)

        setattr(guest, method, act)
        print(controller.incoming(uri), flush=True)
        if controller.wait().status is MigrationStatus.COMPLETED:
            print("running", flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main()
