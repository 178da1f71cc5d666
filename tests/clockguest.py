"""What the guest program `clock` has said."""

import re


def last_sequence(output: bytes) -> int:
    """Sequence number of the last line that has come that far.

    A guest is stopped anywhere in a line: the next one may be in two parts on two consoles, the one after it is whole.
    """
    return int(re.findall(rb"seq (\d+) ", output)[-1])
