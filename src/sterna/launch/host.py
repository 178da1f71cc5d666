"""Where the processes of virtual machines run: this host, or a network namespace on it."""

from dataclasses import dataclass

from sterna.launch.namespace import Namespace


@dataclass(frozen=True)
class Host:
    """Where processes run.

    :ivar address: IPv4, where the others reach it
    :ivar namespace: the processes' network; None on loopback
    """

    name: str
    address: str
    namespace: Namespace | None = None

    def enter(self) -> None:
        """In a child between fork and exec: move in."""
        if self.namespace is not None:
            self.namespace.enter()


LOCAL = Host("this host", "127.0.0.1")
"""For VMs that need no network of their own."""
