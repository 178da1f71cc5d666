"""Addresses of a host, looked up in bounded time: `getaddrinfo` itself waits for a name service as long as that likes."""

import os
import select
import socket
import threading

LOOKUP_SECONDS = 10.0
"""How long a name service may take. glibc asks each server twice, for 5 s each (resolv.conf(5))."""

Address = tuple[socket.AddressFamily, object]
"""An address family, and an address of it for `connect` and `bind`."""


def look_up(
    host: str, port: int, *, passive: bool = False, cancel_fd: int = -1, seconds: float = LOOKUP_SECONDS
) -> list[Address]:
    """The addresses of a TCP port, in the order in which to try them.

    :param passive: they are to be listened on
    :param cancel_fd: ends the wait when it is readable
    :raise OSError: When the host is unknown, no name service answers, or `cancel_fd` ended the wait; the text says which.
    """
    flags = socket.AI_PASSIVE if passive else 0
    try:
        return _ask(host, port, flags | socket.AI_NUMERICHOST)
    except (socket.gaierror, UnicodeError):
        pass  # it is a name
    answers: list[list[Address] | OSError] = []
    done, finished = os.pipe()

    def ask() -> None:
        try:
            answers.append(_ask(host, port, flags))
        except UnicodeError:
            answers.append(OSError("not a host name"))
        except OSError as error:
            answers.append(OSError(str(error.strerror).lower()))
        finally:
            os.close(finished)

    try:
        # Nothing ends a call of getaddrinfo: whoever has waited long enough leaves it to itself.
        try:
            thread = threading.Thread(target=ask, name="host-lookup", daemon=True)
            thread.start()
        except RuntimeError as error:  # the operating system has no thread to spare
            os.close(finished)
            raise OSError(str(error)) from error
        poll = select.poll()
        poll.register(done, select.POLLIN)
        if cancel_fd >= 0:
            poll.register(cancel_fd, select.POLLIN)
        if not poll.poll(seconds * 1000):
            raise OSError(f"no name service answered in {seconds:g} s")
    finally:
        os.close(done)
    if not answers:
        raise OSError("the wait for the name service was ended")
    thread.join()  # it has nothing left to do
    if isinstance(answers[0], OSError):
        raise answers[0]
    return answers[0]


def _ask(host: str, port: int, flags: int) -> list[Address]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]
