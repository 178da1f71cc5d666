"""A virtio entropy device (Virtual I/O Device Version 1.1, 5.4): it fills the guest's buffers with random bytes of the host's.

A request is answered by the access that tells of it, on the vCPU's thread: the host's random bytes never have to be waited for. A
migration may bring requests that nobody will tell of once more, so the device looks for some whenever it goes on.
"""

import os

from sterna.machine.virtio.device import Port, VirtioDevice
from sterna.machine.virtio.kind import Kind
from sterna.machine.virtio.queue import QueueError

MAX_BYTES = 4096
"""The most that a request gets: a vCPU must not be kept for long. A driver asks again for what it lacks (5.4.6.1)."""


class VirtioRng(VirtioDevice):
    """The device."""

    kind = Kind("virtio-rng", device_id=4, queue_limits=(8,))

    def __init__(self, port: Port) -> None:
        super().__init__(port)
        self._running = False

    @property
    def asked_for(self) -> tuple[str, str]:
        """It has nothing that tells it from others."""
        return "a random number generator", "--device virtio-rng"

    def pause(self) -> None:
        """Let requests wait."""
        with self.transport.lock:
            self._running = False

    def resume(self) -> None:
        """Answer requests, those too that have waited."""
        with self.transport.lock:
            self._running = True
            self.notify()

    def notify(self) -> None:
        """Answer what waits, but no more than the queue holds: a driver that goes on asking tells of it."""
        if not (self._running and self.transport.driver_ok):
            return
        queue = self.transport.queues[0]
        try:
            for _ in range(queue.waiting()):
                self._answer()
        except QueueError as error:
            self.transport.fail(error)

    def _answer(self) -> None:
        queue = self.transport.queues[0]
        chain = queue.peek()
        if chain is None or not chain.writable_bytes:
            raise QueueError("a request has no room for random bytes")
        data = os.urandom(min(chain.writable_bytes, MAX_BYTES))
        queue.scatter(chain, data)
        queue.advance()
        if queue.push(chain.head, len(data)):
            self.transport.interrupt()


DEVICE = VirtioRng
