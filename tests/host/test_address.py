"""Addresses as people write them, and what listens there."""

import os
import socket

import pytest

from sterna.host.address import AddressError, InetAddress, listen_inet, listen_path, parse_inet, parse_path


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("localhost:4321", "localhost", 4321),
        (":0", "", 0),
        ("[::1]:65535", "::1", 65535),
        ("[]:1", "", 1),
        ("192.0.2.1:00080", "192.0.2.1", 80),
    ],
)
def test_hosts_and_ports(text: str, host: str, port: int) -> None:
    address = parse_inet(text)
    assert address == InetAddress(host, port)
    assert parse_inet(str(address)) == address


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the port is missing"),
        ("localhost", "the port is missing"),
        ("localhost:", "port '' is not a number from 0 to 65535"),
        ("localhost:x", "port 'x' is not a number"),
        ("localhost:-1", "port '-1' is not a number"),
        ("localhost:+1", "port '\\+1' is not a number"),
        ("localhost:65536", "port '65536' is not a number"),
        ("localhost:١", "port '١' is not a number"),
        ("localhost:000080", "port '000080' is not a number"),
        ("localhost:" + "0" * 5000, "port '0{40}' is not a number"),
        ("::1:80", r"an IPv6 address needs brackets, \[ADDRESS\]:PORT"),
        ("[::1:80", r"an IPv6 address is written \[ADDRESS\]:PORT"),
        ("[::1]80", r"an IPv6 address is written \[ADDRESS\]:PORT"),
    ],
)
def test_what_is_no_host_and_port(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=f"^{message}"):
        parse_inet(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the path is missing"),
        ("a\0b", "the path holds a zero byte"),
        ("x" * 108, "the path is longer than 107 bytes"),
        ("é" * 54, "the path is longer than 107 bytes"),
    ],
)
def test_what_is_no_path_of_a_socket(text: str, message: str) -> None:
    with pytest.raises(AddressError, match=message):
        parse_path(text)


def test_the_longest_path_is_one() -> None:
    path = parse_path("x" * 107)
    assert len(os.fsencode(path)) == 107


@pytest.mark.parametrize("both", [False, True])
def test_everywhere_of_ipv6_has_ipv4_only_when_it_is_asked_for(both: bool) -> None:
    with listen_inet((socket.AF_INET6, ("::", 0)), 1, both=both) as listener, socket.socket() as client:
        where = ("127.0.0.1", listener.getsockname()[1])
        assert (client.connect_ex(where) == 0) == both


def test_a_path_goes_with_its_socket(tmp_path) -> None:
    path = str(tmp_path / "socket")
    listener, bound = listen_path(path, 1)
    with listener, pytest.raises(OSError, match="in use"):
        listen_path(path, 1)
    bound.remove()
    assert not os.path.lexists(path)
