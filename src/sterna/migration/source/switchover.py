"""The switchover at the source: the guest is stopped, and what is left of it is sent, but for the stream's end."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

from sterna.memory.digest import RamDigest
from sterna.memory.rollingdigest import RollingDigest
from sterna.migration import verify
from sterna.migration.errors import Cancelled
from sterna.migration.phase import Phase
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.source.handover import HandOver
from sterna.migration.source.passes import Passes
from sterna.migration.statistics import MigrationStatus, Timeline
from sterna.migration.transport.work import PassWork
from sterna.ownership import OwnershipState
from sterna.stream import sections
from sterna.stream.description import stream_description
from sterna.stream.vmstate import DeviceState, VmStateDescription

_FIRST_DEVICE_ID = 2


class SwitchOver(Phase):
    """Stops the guest, and sends the last pass, the devices and the digests.

    :param rest: the dirty pages that are to be sent yet
    :param then: the phase that follows, made of the context, the link, the stream's end and the marks of the downtime
    """

    fault = "the guest cannot be resumed"

    def __init__(
        self,
        context: SourceContext,
        link: Link,
        passes: Passes,
        rest: PassWork,
        then: Callable[[SourceContext, Link, bytes, Timeline], Phase] = HandOver,
    ) -> None:
        self._context, self._link, self._passes, self._rest, self._then = context, link, passes, rest, then
        self._digest_useless = threading.Event()
        self._stopped = False

    def run(self, stack: ExitStack) -> Phase:
        context, link = self._context, self._link
        stack.enter_context(self._time_limit())
        context.progress.advance(MigrationStatus.DEVICE)
        timeline = Timeline()
        self._stopped = True
        timeline.stop = context.guest.stop_for_migration()
        timeline.stopped = time.time_ns()
        rest = self._passes.sync(self._rest)
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool, self._digest_gives_up():
            digest: Future[RamDigest] | None = None
            if link.digest is not None:
                digest = pool.submit(self._digest_ram, link.digest)
            self._send_rest(rest)
            timeline.last_pass = time.time_ns()
            devices, devices_digest = self._send_devices()
            timeline.device_state = time.time_ns()
            end = self._make_end(devices, devices_digest, digest)
        return self._then(context, link, end, timeline)

    def undo(self, state: OwnershipState) -> None:
        guest = self._context.guest
        if not self._stopped:
            return
        match state:
            case OwnershipState.OWNER:
                guest.resume()
            case OwnershipState.IN_DOUBT:
                guest.leave_in_doubt()
            case _:
                guest.migrated_away()

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """A peer that falls silent must not keep the guest stopped: this goes on until the guest has changed hands."""
        seconds = self._context.parameters.seconds("x-sterna-switchover-timeout")
        timer = threading.Timer(seconds, self._context.expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    # -- what is left ----------------------------------------------------------------------------------------

    def _send_rest(self, rest: PassWork) -> None:
        passes = self._passes
        self._context.progress.begin_pass(rest.pages)
        for batch in rest.batches():
            passes.send(batch, final=True)
        passes.flush(final=True)
        passes.finish(0)
        self._context.progress.sent_other(self._link.pages.send_end().size, final=True)

    def _send_devices(self) -> tuple[list[tuple[VmStateDescription, DeviceState]], int]:
        """:return: what was sent, and its digest"""
        guest = self._context.guest
        states = guest.save_devices()
        devices = [(guest.descriptions[state.name], state) for state in states]
        bodies = [description.encode(state) for description, state in devices]
        encoded = list(zip(states, bodies, strict=True))
        framed = (sections.framed(number, *part) for number, part in enumerate(encoded, _FIRST_DEVICE_ID))
        self._context.send(self._link.channel, b"".join(framed), final=True)
        return devices, verify.devices_digest(encoded)

    def _make_end(
        self,
        devices: Sequence[tuple[VmStateDescription, DeviceState]],
        devices_digest: int,
        digest: "Future[RamDigest] | None",
    ) -> bytes:
        """Send the digests, if there are any.

        :return: what is left of the stream: its end and its description
        """
        if digest is not None:
            state = verify.to_state(digest.result(), devices_digest)
            section = sections.device_section(_FIRST_DEVICE_ID + len(devices), verify.SECTION, state)
            self._context.send(self._link.channel, section, final=True)
            devices = [*devices, (verify.SECTION, state)]
        description = stream_description(devices, 1 << self._context.page_bits)
        return sections.end_of_stream() + sections.vm_description(description)

    # -- the digest of RAM -----------------------------------------------------------------------------------

    def _digest_ram(self, rolling: RollingDigest) -> RamDigest:
        started = time.monotonic()
        digest = rolling.finish(check=self._check_digest)
        digest_ms = (time.monotonic() - started) * 1000
        self._context.progress.note(ram_digest_source=digest.hex, digest_ms=digest_ms)
        return digest

    def _check_digest(self) -> None:
        self._context.cancellation.check()
        if self._digest_useless.is_set():
            raise Cancelled

    @contextmanager
    def _digest_gives_up(self) -> Iterator[None]:
        """When the body fails, the stopped guest does not wait for the digest of its RAM."""
        try:
            yield
        except BaseException:
            self._digest_useless.set()
            raise
