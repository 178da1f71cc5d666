"""The source of a migration: precopy.

Setup (connect, header, greeting, RAM blocks, dirty logging on), then passes: all pages first, then what the
dirty log says was written since, until the rest is estimated to fit the downtime limit; then the guest stops,
and the last pages, the devices and the end follow. How the guest changes hands is `sterna.migration.source.handover`'s
subject.

Whatever goes wrong, and whenever: logging is off, the channel closed, and the guest runs if it ran before,
unless the destination runs it or cannot be asked. What goes wrong after the guest has changed hands is logged, and the
migration has succeeded.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass

from sterna.host.printable import describe
from sterna.hypervisor.traits import first_difference
from sterna.memory.digest import RamDigest
from sterna.memory.ram import RamError
from sterna.memory.rollingdigest import RollingDigest
from sterna.migration import handshake, process, verify
from sterna.migration.audit import Audit, NoAudit, ShadowAudit
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.errors import (
    Cancelled,
    ChannelError,
    InDoubt,
    MigrationError,
    Refused,
    Unsynced,
    VerificationError,
)
from sterna.migration.handshake import Offer
from sterna.migration.multifd.sender import MultifdSender
from sterna.migration.pages import PageHeat, PassWork
from sterna.migration.pagesender import RAM_ID, PageSender, RecordSender
from sterna.migration.parameters import Verify
from sterna.migration.peer import Greeted, NackError, Peer, PeerKind
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.source.handover import HandOver
from sterna.migration.source.precopy import Precopy
from sterna.migration.statistics import MigrationStatus, Timeline
from sterna.migration.xbzrlecache import XbzrleCache, affordable_cache
from sterna.ownership import Standing
from sterna.stream import ram, sections
from sterna.stream.description import stream_description
from sterna.stream.vmstate import DeviceState, VmStateDescription
from sterna.stream.wire import RAM_SECTION, RAM_VERSION

log = logging.getLogger(__name__)

_FIRST_DEVICE_ID = 2

_QUESTION_SECONDS = 5.0
"""How long the user's own question to the destination may take."""

_HANDED_OVER = frozenset({Standing.AWAY, Standing.SAVED, Standing.HANDED_ON})
"""Once it has come to that, nothing that fails here is a failure of the migration."""


@dataclass
class Source:
    """One outgoing migration. `run` does all of it on the caller's thread; `cancel` may come from any other.

    The progress must be in setup, so that the migration is visible before `run` gets going.
    """

    context: SourceContext

    def __post_init__(self) -> None:
        self._timeline = Timeline()
        self._digest_useless = threading.Event()
        self._precopy: Precopy | None = None
        self._cache: XbzrleCache | None = None
        self._audit: Audit = NoAudit()
        self._logging = False
        self._stopped = False
        self._digest: RamDigest | None = None

    def page_heat(self, cells: int) -> list[PageHeat]:
        """How often pages were sent so far, with at most so many cells for each RAM block."""
        return self.context.sent_pages.heat(cells)

    def cancel(self) -> None:
        """Cancel. Once COMMIT is on its way the destination decides, and the migration may still complete; who cancels while its
        word is waited for in doubt waits no longer.
        """
        self.context.progress.cancelling()
        self.context.doubt.stop_waiting()  # first: what follows may begin that wait
        self.context.cancellation.set()

    def abandon(self, reason: str) -> None:
        """It will not be run: nothing was done, and nothing is left of it."""
        self.context.progress.enter(MigrationStatus.FAILED, error=reason)
        self.context.ends.close()

    @property
    def resolvable(self) -> bool:
        """Whether it ended in doubt, and still is."""
        hold = self.context.guest.ownership.hold
        return hold.standing is Standing.IN_DOUBT and hold.migration == self.context.migration_id.bytes

    def resolve_doubt(self, uri: uris.Uri | None) -> str:
        """After the migration: ask again who runs the guest. It stays stopped here.

        :param uri: where the destination can be asked, when that is not where the guest was sent
        :return: what was found out, in one line
        :raise InDoubt: When nothing was.
        """
        try:
            self.context.doubt.resolve(_QUESTION_SECONDS, self.context.closing, uri)
        except InDoubt:
            raise
        except MigrationError as error:
            found = f"{error}: it is this machine's, and 'cont' runs it"
        else:
            runs = self.context.guest.ownership.standing is Standing.AWAY
            found = (
                "the guest runs at the destination"
                if runs
                else "the command has all of the guest, and may run it"
            )
            self.context.guest.migrated_away()
        self.context.doubt.stop_watching()
        self.context.progress.settle(found)
        return found

    # -- outcomes --------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Migrate; the outcome is in the progress."""
        try:
            self._migrate()
        except Exception as error:
            self._recover(error)
        else:
            self._leave()
        finally:
            self.context.ends.close()

    def _leave(self) -> None:
        """The guest has changed hands: what fails from here on is told, and the migration has succeeded."""
        for step, fault in (
            (self.context.guest.migrated_away, "this machine cannot be left"),
            (self._stop_logging, "its throttle and dirty log cannot be ended"),
        ):
            try:
                step()
            except Exception as error:
                log.error("%s after the guest has left: %s", fault, describe(error))
        self.context.progress.enter(MigrationStatus.COMPLETED)

    def _recover(self, error: Exception) -> None:
        """The migration failed: logging off; if the guest is still this machine's, it runs if it ran before."""
        text, standing = describe(error), self.context.guest.ownership.standing
        if isinstance(error, Unsynced):
            text += "; the guest was saved, and stands still: 'cont' runs it"
        elif standing in _HANDED_OVER:
            log.error("after the guest has left: %s", text)
            self._leave()
            return
        in_doubt = standing is Standing.IN_DOUBT
        if in_doubt and not isinstance(error, InDoubt):
            text += f"; {self.context.doubt.advice}"
        elif self.context.overdue and standing is Standing.OWNER:
            seconds = self.context.parameters.switchover_timeout_seconds
            text = f"the destination did not take the stopped guest over within {seconds:.1f} s"
        try:
            self._stop_logging()
        except Exception as worse:
            text += f"; and its throttle and dirty log cannot be ended: {worse}"
        if self._stopped:
            try:
                match standing:
                    case Standing.OWNER:
                        self.context.guest.resume()
                    case Standing.IN_DOUBT:
                        self.context.guest.leave_in_doubt()
                    case _:
                        self.context.guest.migrated_away()
            except Exception as worse:
                text += f"; and the guest cannot be resumed: {worse}"
        if self.context.cancellation.is_set and not self.context.overdue and standing is Standing.OWNER:
            self.context.progress.cancelling()
            self.context.progress.enter(MigrationStatus.CANCELLED)
        else:
            self.context.progress.enter(MigrationStatus.FAILED, error=text, in_doubt=in_doubt)

    @contextmanager
    def _time_limit(self) -> Iterator[None]:
        """A peer that falls silent must not keep the guest stopped."""
        timer = threading.Timer(self.context.parameters.switchover_timeout_seconds, self._expire)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()

    def _expire(self) -> None:
        """The guest has been stopped for too long: give the switchover up, as a cancel would."""
        if not self.context.cancellation.is_set:
            self.context.overdue = True
            self.context.cancellation.set()

    def _stop_logging(self) -> None:
        try:
            if self._precopy is not None:
                self._precopy.release()
        finally:
            if self._logging:
                self._logging = False
                self.context.guest.stop_dirty_logging()

    # -- phases ----------------------------------------------------------------------------------------------

    def _migrate(self) -> None:
        if self.context.parameters.audit:
            self._audit = ShadowAudit(self.context.guest, self.context.progress, self.context.sent_pages)
            self.context.ends.callback(self._audit.close)
        self._cache = self._make_cache()
        if self._cache is not None:
            self.context.ends.callback(self._cache.close)
            self.context.progress.note(xbzrle=self._cache.statistics)
        with (
            self.context.uri.connect(self.context.cancellation) as channel,
            closing(self._page_sender(channel)) as pages,
        ):
            peer = Peer(channel)
            try:
                link = self._set_up(channel, pages, peer)
                precopy = self._precopy = Precopy(self.context, link)
                rest = precopy.run()
                with self._time_limit():
                    self._switch_over(link, precopy, rest)
            except Cancelled:
                self._tell_cancelled()
                raise
            except NackError as error:
                raise self._explain(error.nack) from error
            except ChannelError as error:
                channel.watch(self.context.closing)
                reason = peer.explain(error)
                if isinstance(reason, NackError):
                    reason = self._explain(reason.nack)
                raise reason from error

    def _tell_cancelled(self) -> None:
        """Unless the guest stands still for it: the destination also goes by the stream's end."""
        listens = self._precopy and handshake.FEATURE_CANCEL in self._precopy.link.greeted.features
        if listens and not self._stopped:
            self.context.doubt.tell_cancelled(self.context.closing)

    def _explain(self, nack: handshake.Nack) -> MigrationError:
        if not nack.block:
            return Refused(f"destination refused: {nack.reason}")
        self.context.progress.note(verified=False, ram_digest_destination=nack.digest)
        if nack.chunk < 0:
            return VerificationError(f"destination refused: {nack.reason}")
        return VerificationError(
            verify.locate(
                self.context.guest.ram_blocks, nack.block, nack.chunk, nack.pages, self.context.sent_pages
            )
        )

    def _make_cache(self) -> XbzrleCache | None:
        """The XBZRLE cache, if the user asked for one or left it to the policy.

        :raise RamError: When the user asked, and the host refuses the memory or has too little left.
        """
        blocks, own = self.context.guest.ram_blocks, self.context.parameters.policy.own
        copy = sum(block.size for block in blocks) if self.context.parameters.audit else 0
        if self.context.parameters.xbzrle:
            size = self.context.parameters.xbzrle_cache_size
            return XbzrleCache(blocks, size, self.context.page_bits, from_start=own, audit_bytes=copy)
        # QEMU and sterna take XBZRLE whether or not they are told; who reads a file or a pipe is not known.
        if not (
            own
            and self.context.parameters.may_choose_xbzrle
            and isinstance(self.context.uri, uris.ListeningUri)
        ):
            return None
        size = affordable_cache(blocks, copy)
        if self.context.multifd is not None or not size:
            return None
        try:
            return XbzrleCache(blocks, size, self.context.page_bits, from_start=True)
        except RamError:
            return None

    def _page_sender(self, channel: Channel) -> PageSender:
        if self.context.multifd is None:
            return RecordSender(channel, self.context.limiter, self._cache, self.context.page_bits)
        assert isinstance(self.context.uri, uris.ListeningUri)
        return MultifdSender(
            channel,
            self.context.uri,
            self.context.multifd,
            self.context.limiter,
            self._cache,
            self.context.page_bits,
            self.context.cancellation,
        )

    def _set_up(self, channel: Channel, pages: PageSender, peer: Peer) -> Link:
        identity = self.context.guest.uuid if self.context.parameters.validate_uuid else None
        configuration = sections.Configuration(
            self.context.guest.machine_type, self.context.guest.page_bits, identity
        )
        self.context.send(channel, sections.header(configuration))
        greeted = peer.greet()
        self.context.progress.note(peer=greeted.kind.value, clock_offset_ns=greeted.clock_offset_ns)
        self._check_multifd(greeted)
        if greeted.kind is PeerKind.STERNA:
            difference = first_difference(self.context.guest.guest_traits(), greeted.host)
            if difference is not None:
                raise Refused(f"the destination's host cannot run this guest: {difference}")
            multifd = self.context.multifd
            channels, token = (multifd.channels, multifd.token.hex()) if multifd else (0, "")
            self.context.doubt.watch = process.watch(greeted.process)
            own = self.context.process.identity if self.context.doubt.watch is not None else None
            peer.offer(Offer(self.context.migration_id.hex, self._verifies(greeted), channels, token, own))
        elif self._verifies(greeted) and greeted.kind is PeerKind.QEMU:
            raise MigrationError(
                "x-sterna-verify is on, but the destination cannot verify: it is not a sterna"
            )
        # Logging begins before the first page is looked at, so no write can fall between.
        self._logging = True
        self.context.guest.start_dirty_logging()
        digest: RollingDigest | None = None
        if self._verifies(greeted):
            digest = RollingDigest(self.context.guest.ram_blocks)
            self.context.ends.callback(digest.stop)
            digest.start()
        blocks = [(block.name, block.size) for block in self.context.guest.ram_blocks]
        opening = sections.section_start(RAM_ID, RAM_SECTION, 0, RAM_VERSION)
        setup = pages.send_setup(opening + ram.ram_setup(blocks) + sections.footer(RAM_ID))
        self.context.progress.sent_other(setup.size)
        return Link(channel, peer, greeted, pages, self._cache, digest, self._audit)

    def _check_multifd(self, greeted: Greeted) -> None:
        if self.context.multifd is None or self._cache is None:
            return
        if handshake.FEATURE_MULTIFD_XBZRLE not in greeted.features:
            kind = greeted.kind.value or "one-way channel"
            raise MigrationError(
                f"the capabilities multifd and xbzrle together need a sterna at the destination, and this is a {kind}: "
                "switch one of them off"
            )

    def _verifies(self, greeted: Greeted) -> bool:
        wanted = self.context.parameters.verify
        able = handshake.FEATURE_DIGEST in greeted.features
        if wanted is Verify.ON and greeted.kind is PeerKind.STERNA and not able:
            raise MigrationError("x-sterna-verify is on here, but off at the destination")
        return wanted is Verify.ON or (wanted is Verify.AUTO and able)

    def _switch_over(self, link: Link, precopy: Precopy, rest: PassWork) -> None:
        self.context.progress.advance(MigrationStatus.DEVICE)
        timeline = self._timeline
        self._stopped = True
        timeline.stop = self.context.guest.stop_for_migration()
        timeline.stopped = time.time_ns()
        rest = precopy.take_rest(rest)
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool, self._digest_gives_up():
            digest: Future[RamDigest] | None = None
            if link.digest is not None:
                digest = pool.submit(self._digest_ram, link.digest)
            precopy.send_rest(rest)
            self.context.progress.sent_other(link.pages.send_end().size, final=True)
            timeline.last_pass = time.time_ns()
            devices, devices_digest = self._send_devices(link.channel)
            timeline.device_state = time.time_ns()
            end = self._make_end(link.channel, devices, devices_digest, digest)
        self._hand_over(link, end)
        parts = timeline.parts()
        self.context.progress.note(downtime_parts=parts, downtime_ms=parts.total)

    @contextmanager
    def _digest_gives_up(self) -> Iterator[None]:
        """When the body fails, the stopped guest does not wait for the digest of its RAM."""
        try:
            yield
        except BaseException:
            self._digest_useless.set()
            raise

    def _check_digest(self) -> None:
        self.context.cancellation.check()
        if self._digest_useless.is_set():
            raise Cancelled

    def _digest_ram(self, rolling: RollingDigest) -> RamDigest:
        started = time.monotonic()
        digest = rolling.finish(check=self._check_digest)
        self.context.progress.note(
            ram_digest_source=digest.hex, digest_ms=(time.monotonic() - started) * 1000
        )
        return digest

    def _send_devices(self, channel: Channel) -> tuple[list[tuple[VmStateDescription, DeviceState]], int]:
        """:return: what was sent, and its digest"""
        states = self.context.guest.save_devices()
        devices = [(self.context.guest.descriptions[state.name], state) for state in states]
        bodies = [description.encode(state) for description, state in devices]
        encoded = list(zip(states, bodies, strict=True))
        framed = (sections.framed(number, *part) for number, part in enumerate(encoded, _FIRST_DEVICE_ID))
        self.context.send(channel, b"".join(framed), final=True)
        return devices, verify.devices_digest(encoded)

    def _make_end(
        self,
        channel: Channel,
        devices: Sequence[tuple[VmStateDescription, DeviceState]],
        devices_digest: int,
        digest: "Future[RamDigest] | None",
    ) -> bytes:
        """Send the digests, if there are any.

        :return: what is left of the stream: its end and its description
        """
        if digest is not None:
            self._digest = digest.result()
            state = verify.to_state(self._digest, devices_digest)
            section = sections.device_section(_FIRST_DEVICE_ID + len(devices), verify.SECTION, state)
            self.context.send(channel, section, final=True)
            devices = [*devices, (verify.SECTION, state)]
        description = stream_description(devices, 1 << self.context.page_bits)
        return sections.end_of_stream() + sections.vm_description(description)

    # -- handing over ----------------------------------------------------------------------------------------

    def _hand_over(self, link: Link, end: bytes) -> None:
        """The stream's end, and the guest with it."""
        timeline, greeted = self._timeline, link.greeted
        hand_over = HandOver(self.context.doubt, link.channel, link.peer, self.context.closing)
        self.context.progress.sent_other(len(end), final=True)
        match greeted.kind:
            case PeerKind.STERNA:
                link.channel.send(end)
                timeline.digest = time.time_ns()
                ready = hand_over.await_ready()
                timeline.loaded = time.time_ns()
                if self._digest is not None:
                    self.context.progress.note(verified=True, ram_digest_destination=ready.digest)
                clock_ns, note = hand_over.commit(
                    timeline.stop, greeted.clock_offset_ns, self.context.parameters.doubt_timeout_seconds
                )
                timeline.started = clock_ns - greeted.clock_offset_ns
                self.context.progress.note(clock_note=note)
            case PeerKind.QEMU:
                timeline.digest = time.time_ns()
                hand_over.end_to_qemu(end, self.context.parameters.doubt_timeout_seconds)
                timeline.loaded = time.time_ns()
            case PeerKind.SILENT:
                timeline.digest = time.time_ns()
                hand_over.end_one_way(end, self.context.parameters.doubt_timeout_seconds)
                timeline.loaded = time.time_ns()
