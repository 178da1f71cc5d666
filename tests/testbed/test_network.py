"""Hosts, links and the router, on the kernel's own network namespaces."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.cli.vms import wait_for
from tests.ports import held_port

from sterna.launch.errors import Unsupported
from sterna.launch.host import Host, Namespace
from sterna.testbed.errors import BedError
from sterna.testbed.links import Link
from sterna.testbed.network import LoopbackNetwork, NamespaceNetwork, make_network

GUEST = "10.83.9.2"


@pytest.fixture
def network(root: None) -> Iterator[NamespaceNetwork]:
    with NamespaceNetwork(0) as made:
        assert isinstance(made, NamespaceNetwork)
        yield made


def listen(host: Host) -> socket.socket:
    """A socket that listens there."""
    assert host.namespace is not None
    return host.namespace.call(lambda: socket.create_server((host.address, 0)))


def connect(host: Host, address: tuple[str, int]) -> socket.socket:
    assert host.namespace is not None
    return host.namespace.call(lambda: socket.create_connection(address, 300))


def test_every_host_reaches_every_other(network: NamespaceNetwork) -> None:
    everyone = (*network.hosts, network.server)
    for target in everyone:
        with listen(target) as listener:
            for source in everyone:
                connect(source, listener.getsockname()).close()
                listener.accept()[0].close()


def test_hosts_are_apart_from_this_machine(network: NamespaceNetwork) -> None:
    before = set(os.listdir("/sys/class/net"))
    host = network.hosts[0]
    assert host.namespace is not None
    with (
        held_port() as port,  # on this machine nobody else can listen there
        host.namespace.call(lambda: socket.create_server(("", port))),
        pytest.raises(ConnectionRefusedError),
    ):
        socket.create_connection(("127.0.0.1", port), 300)
    assert set(os.listdir("/sys/class/net")) == before


def test_a_process_runs_on_its_host(network: NamespaceNetwork) -> None:
    host = network.hosts[1]
    script = f"import socket; socket.create_server(({host.address!r}, 0)).close()"
    command = [sys.executable, "-c", script]
    assert subprocess.run(command, preexec_fn=host.enter, check=False).returncode == 0
    assert subprocess.run(command, stderr=subprocess.DEVNULL, check=False).returncode != 0


def test_the_rate_is_kept(root: None) -> None:
    rate, size = 5_000_000, 4_000_000
    with NamespaceNetwork(rate) as network, listen(network.hosts[1]) as listener:
        near = connect(network.hosts[0], listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            sender = threading.Thread(target=near.sendall, args=(bytes(size),))
            started, got = time.monotonic(), 0
            sender.start()
            while got < size:
                got += len(far.recv(1 << 20))
            seconds = time.monotonic() - started
            sender.join()
    # A bucket's worth may come at once; nothing hurries the rest.
    assert size / seconds < rate * 1.15


def test_a_pulled_cable_drops_and_a_plugged_one_goes_on(network: NamespaceNetwork) -> None:
    with listen(network.hosts[1]) as listener:
        near = connect(network.hosts[0], listener.getsockname())
        far, _ = listener.accept()
        with near, far:
            far.settimeout(0.3)
            network.set_link(network.hosts[1], up=False)
            near.sendall(b"late")
            with pytest.raises(TimeoutError):
                far.recv(10)
            network.set_link(network.hosts[1], up=True)
            far.settimeout(300)
            assert far.recv(10) == b"late"
        connect(network.server, listener.getsockname()).close()


def test_a_guests_address_follows_it(network: NamespaceNetwork) -> None:
    # The hosts stand in for the guest: each answers at its address once it is there.
    for host in network.hosts:
        assert host.namespace is not None
        subprocess.run(
            ["ip", "address", "add", f"{GUEST}/32", "dev", "lo"], preexec_fn=host.enter, check=True
        )
    listeners = [
        host.namespace.call(lambda: socket.create_server((GUEST, 7)))
        for host in network.hosts
        if host.namespace
    ]
    try:
        for index in (0, 1, 0):
            network.route_guest(GUEST, network.hosts[index])
            connect(network.server, (GUEST, 7)).close()
            listeners[index].accept()[0].close()
        # The route comes back with the cable.
        network.set_link(network.hosts[0], up=False)
        network.set_link(network.hosts[0], up=True)
        connect(network.server, (GUEST, 7)).close()
        listeners[0].accept()[0].close()
    finally:
        for listener in listeners:
            listener.close()


def test_a_name_in_use_is_told(root: None) -> None:
    namespaces = [Namespace(), Namespace()]
    Link(namespaces[1], namespaces[0], "host1", "10.83.1.1", "10.83.1.254", 0)
    try:
        with pytest.raises(BedError, match=r"host1.*in use"):
            Link(namespaces[1], namespaces[0], "host1", "10.83.1.1", "10.83.1.254", 0)
    finally:
        for namespace in namespaces:
            namespace.close()


def test_closing_twice_does_nothing(root: None) -> None:
    network = NamespaceNetwork(0)
    assert network.hosts[0].namespace is not None
    path = Path(f"/proc/self/fd/{network.hosts[0].namespace.fd}")
    assert path.exists()
    network.close()
    network.close()
    assert not path.exists()


def test_without_root_all_is_on_loopback() -> None:
    # Not root, in a process of its own.
    script = (
        "import os\n"
        "from sterna.testbed.network import make_network\n"
        "if os.geteuid() == 0: os.setuid(65534)\n"
        "network = make_network(1000)\n"
        "print(network.note, [host.address for host in network.hosts], network.enforces_rate)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "network namespaces need root" in done.stdout, done.stderr
    assert "['127.0.0.1', '127.0.0.1'] False" in done.stdout


def test_loopback_says_what_it_cannot() -> None:
    with LoopbackNetwork(0, "for a test") as network:
        with pytest.raises(Unsupported, match="root"):
            network.set_link(network.hosts[0], up=False)
        with pytest.raises(Unsupported, match="root"):
            network.route_guest(GUEST, network.hosts[0])


def test_make_network(root: None) -> None:
    with make_network(0) as network:
        assert network.note == ""
        assert network.enforces_rate


def test_networks_end_with_a_killed_process(root: None) -> None:
    script = (
        "import os, time\n"
        "from sterna.testbed.network import NamespaceNetwork\n"
        "network = NamespaceNetwork(1000000)\n"
        "print(*[os.fstat(host.namespace.fd).st_ino for host in network.hosts], flush=True)\n"
        "time.sleep(60)\n"
    )
    names = set(os.listdir("/run/netns")) if Path("/run/netns").exists() else set()
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        inodes = set(process.stdout.readline().split())
        process.kill()
    assert len(inodes) == 2
    wait_for(lambda: not inodes & namespaces_in_use())
    assert (set(os.listdir("/run/netns")) if Path("/run/netns").exists() else set()) == names


def namespaces_in_use() -> set[str]:
    """Network namespaces that a process is in or holds open, by inode."""
    found = set()
    for process in os.listdir("/proc"):
        if not process.isdecimal():
            continue
        # Processes and descriptors come and go meanwhile.
        links = [f"/proc/{process}/ns/net"]
        with suppress(OSError):
            links += [f"/proc/{process}/fd/{number}" for number in os.listdir(f"/proc/{process}/fd")]
        for link in links:
            with suppress(OSError):
                target = os.readlink(link)
                if target.startswith("net:["):
                    found.add(target[5:-1])
    return found
