"""TCP ports for tests."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port of the loopback address where nobody listens. It is bound here in the body of the `with` statement, so the kernel
    gives it to nobody; but who names it and sets SO_REUSEADDR, as sterna, QEMU and `socket.create_server` do, can listen
    there (socket(7)).
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
