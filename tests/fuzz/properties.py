"""``python -m tests.fuzz.properties``: the property tests, round after round, each round with examples of its own.

`make test` runs them with the same examples each time. What a round finds is kept in `.hypothesis`, comes first in the next
run, and belongs into the test as an explicit example.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence


def search(paths: Sequence[str], minutes: float) -> tuple[int, int]:
    """Run rounds until the time is over, at least one, or until one fails.

    :param paths: of tests; none for all
    :return: rounds, and pytest's exit code of the last
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "hypothesis", "--hypothesis-profile=search"]
    deadline = time.monotonic() + minutes * 60
    rounds = code = 0
    while not code and (not rounds or time.monotonic() < deadline):
        rounds += 1
        code = subprocess.run([*command, *paths], check=False).returncode
    return rounds, code


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.properties", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="after which no further round begins")
    parser.add_argument("paths", nargs="*", help="tests; all of them unless named")
    options = parser.parse_args(arguments)
    rounds, code = search(options.paths, options.minutes)
    print(f"{rounds} rounds of the property tests, {'the last of them failed' if code else 'none failed'}")
    return 1 if code else 0


if __name__ == "__main__":
    sys.exit(main())
