"""Addresses of hosts, and name services that do not answer."""

import os
import socket
import threading

import pytest

from sterna.host.lookup import look_up


@pytest.mark.parametrize(("host", "family"), [("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6)])
def test_numbers_are_addresses(host: str, family: socket.AddressFamily) -> None:
    (found,) = look_up(host, 5)
    assert found[0] is family
    assert found[1][:2] == (host, 5)


def test_names_have_addresses() -> None:
    assert (socket.AF_INET, ("127.0.0.1", 5)) in look_up("localhost", 5)
    assert look_up("localhost", 5, passive=True)


@pytest.mark.parametrize("host", ["no.such.host.invalid", "x" * 300, "a..b"])
def test_an_unknown_host_is_an_error_of_one_line(host: str) -> None:
    with pytest.raises(OSError, match=r"^[^\n]+$"):
        look_up(host, 5)


def test_nothing_is_left_of_a_lookup_that_was_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even a thread that has yet to end."""
    close = os.close

    def slow(fd: int) -> None:
        close(fd)
        if threading.current_thread().name == "host-lookup":
            threading.Event().wait(0.2)

    monkeypatch.setattr(os, "close", slow)
    look_up("localhost", 5)
    assert not any(thread.name == "host-lookup" for thread in threading.enumerate())


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch):
    """A name service that does not answer before the test has ended."""
    end, real = threading.Event(), socket.getaddrinfo

    def silent(host: str, port: int, *arguments: int, **named: int) -> object:
        if named["flags"] & socket.AI_NUMERICHOST:
            return real(host, port, *arguments, **named)
        end.wait(300)
        return []

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    yield
    end.set()
    for thread in threading.enumerate():
        if thread.name == "host-lookup":
            thread.join(300)  # it is no longer there for the next test


def test_a_silent_name_service_is_not_waited_for_for_ever(silence: None) -> None:
    with pytest.raises(OSError, match=r"^no name service answered in 0\.05 s$"):
        look_up("somewhere", 5, seconds=0.05)


def test_the_wait_can_be_ended(silence: None) -> None:
    receive, send = os.pipe()
    os.write(send, b"x")
    try:
        with pytest.raises(OSError, match="was ended"):
            look_up("somewhere", 5, cancel_fd=receive, seconds=300)
    finally:
        os.close(receive)
        os.close(send)
