"""What a source that cannot be audited sent, against its RAM: for VMs whose dirty log nobody can look at.

A proxy on the destination's host, behind the link that the source is to feel, forwards the migration and keeps RAM as the
destination has to have it. The source's RAM is a file that the test bed shares; once the guest has stopped for the last time it
must hold the same.
"""

import threading
from pathlib import Path

import numpy as np

from sterna.analysis.proxy.proxy import Proxy
from sterna.analysis.proxy.view import ProxyView
from sterna.jit.ahead import fetch_kernels
from sterna.launch.host import Host
from sterna.memory.address import PAGE_SIZE
from sterna.memory.digest import CHUNK_SIZE, digest_file
from sterna.migration.channels.tcp import TcpUri
from sterna.migration.channels.uri import parse
from sterna.migration.errors import MigrationError
from sterna.testbed.errors import BedError

_READY_SECONDS = 30.0
_ENDED_SECONDS = 60.0


class AuditingProxy:
    """Forwards one migration, on a thread of its own in the destination's network.

    :ivar uri: where the source is to migrate to

    :param host: the destination's
    :param destination: where the destination waits
    :raise BedError: When it cannot listen, or have its thread.
    """

    def __init__(self, host: Host, destination: str) -> None:
        fetch_kernels()
        self.uri = ""
        self._view: ProxyView | None = None
        self._fault = ""
        self._ready = threading.Event()
        self._proxy: Proxy | None = None
        self._thread = threading.Thread(
            target=self._run, args=(host, destination), name="forwarder", daemon=True
        )
        try:
            self._thread.start()
        except RuntimeError as error:  # the operating system has no thread to spare
            raise BedError(f"nothing can be forwarded on {host.name}: {error}") from error
        if not self._ready.wait(_READY_SECONDS) or not self.uri:
            self.cancel()
            raise BedError(f"nothing can be forwarded on {host.name}: {self._fault or 'no answer'}")

    def _run(self, host: Host, destination: str) -> None:
        try:
            host.enter()  # this thread; those of the proxy come from it
            listen, far = parse(f"tcp:{host.address}:0"), parse(destination)
            assert isinstance(listen, TcpUri)
            assert isinstance(far, TcpUri)
            with Proxy(listen, far) as self._proxy:
                self.uri = self._proxy.uri
                self._ready.set()
                self._view = self._proxy.run()
        except (MigrationError, OSError) as error:
            self._fault = str(error)
        finally:
            self._ready.set()

    def cancel(self) -> None:
        """The migration did not come through: end it."""
        if self._proxy is not None and self._thread.is_alive():
            self._proxy.interrupt()
            self._proxy.interrupt()
        self._thread.join(_ENDED_SECONDS)

    def compare(self, block: str, ram: int, base: int) -> tuple[int, list[str]]:
        """After the migration has completed: where the source's RAM is not as it was sent.

        :param block: the RAM block's name in the stream
        :param ram: descriptor of the file that is the source's RAM
        :param base: guest physical address of its first byte
        :return: how many pieces of 2 MiB were compared, and what differs
        :raise BedError: When what was sent is not known.
        """
        self._thread.join(_ENDED_SECONDS)
        survey = self._view.survey if self._view is not None else None
        if survey is None or survey.digest is None:
            fault = self._fault or (self._view.analysis_fault if self._view is not None else "")
            raise BedError(f"what was forwarded is not known: {fault or 'the migration did not end'}")
        sent = next((one for one in survey.digest.blocks if one.block == block), None)
        if sent is None:
            raise BedError(f"what was forwarded has no RAM block {block!r}")
        # The file's offset is shared with the VM, which does not read it: it has it mapped.
        with Path(f"/proc/self/fd/{ram}").open("rb") as file:
            here = digest_file(block, file)
        if here.size != sent.size:
            raise BedError(f"the source's RAM has {here.size} bytes, what was forwarded {sent.size}")
        differ = np.flatnonzero(here.chunks != sent.chunks).tolist()
        pages = CHUNK_SIZE // PAGE_SIZE
        return len(here.chunks), [
            f"of the {pages} pages at {base + chunk * CHUNK_SIZE:#x} some are not as they were sent: writes were lost"
            for chunk in differ
        ]
