"""The root of what this program raises for its callers.

Each package has its own branches; `tests/test_errors.py` holds that nothing grows beside this tree.
"""


class Error(Exception):
    """Something is wrong with what was asked for, with what a peer, a guest or a file said, or with what this host has.

    The text is one line for people, which says what is wrong.
    """
