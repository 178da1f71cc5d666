"""Set up at the source: the way to the destination, and what both ends agree on before the first page."""

from contextlib import ExitStack, closing

from sterna.hypervisor.traits import first_difference
from sterna.memory.ram import RamError
from sterna.memory.rollingdigest import RollingDigest
from sterna.migration import handshake, process
from sterna.migration.audit import Audit, ShadowAudit
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.errors import MigrationError, Refused
from sterna.migration.handshake import Offer
from sterna.migration.parameters import Verify
from sterna.migration.peer import Greeted, Peer, PeerKind
from sterna.migration.phase import Phase
from sterna.migration.source.context import Link, SourceContext
from sterna.migration.source.precopy import Precopy
from sterna.migration.source.reasons import in_their_words
from sterna.migration.transport.multifd.sender import MultifdTransport
from sterna.migration.transport.records import RAM_ID, RecordTransport
from sterna.migration.transport.sender import PageSender, Transport
from sterna.ownership import OwnershipState
from sterna.stream import sections
from sterna.stream.ram.setup import ram_setup
from sterna.stream.wire import RAM_SECTION, RAM_VERSION
from sterna.stream.xbzrle.cache import XbzrleCache, affordable_cache


class SetUp(Phase):
    """Connects, greets, has writes logged, and sends the list of RAM blocks."""

    fault = "its throttle and dirty log cannot be ended"

    def __init__(self, context: SourceContext) -> None:
        self._context = context

    def run(self, stack: ExitStack) -> Precopy:
        context = self._context
        audit, cache = self._make_audit(), self._make_cache()
        channel = stack.enter_context(context.uri.connect(context.cancellation))
        pages = stack.enter_context(closing(self._page_sender(channel, cache)))
        peer = Peer(channel)
        stack.enter_context(in_their_words(context, channel, peer))
        identity = context.guest.uuid if context.parameters.has("validate-uuid") else None
        configuration = sections.Configuration(context.guest.machine_type, context.guest.page_bits, identity)
        context.send(channel, sections.header(configuration))
        greeted = peer.greet()
        context.progress.note(peer=greeted.kind.value, clock_offset_ns=greeted.clock_offset_ns)
        self._check_multifd(greeted, cache)
        verifies = self._agree(peer, greeted)
        # Logging begins before the first page is looked at, so no write can fall between.
        context.logging.start()
        digest = self._start_digest() if verifies else None
        blocks = [(block.name, block.size) for block in context.guest.ram_blocks]
        opening = sections.section_start(RAM_ID, RAM_SECTION, 0, RAM_VERSION)
        setup = pages.send_setup(opening + ram_setup(blocks) + sections.footer(RAM_ID))
        context.progress.sent_other(setup.size)
        return Precopy(context, Link(channel, peer, greeted, pages, cache, digest, audit))

    def undo(self, state: OwnershipState) -> None:
        self._context.logging.stop()

    # -- what goes along -------------------------------------------------------------------------------------

    def _make_audit(self) -> Audit:
        context = self._context
        if not context.parameters.number("x-sterna-audit"):
            return Audit()
        audit = ShadowAudit(context.guest, context.progress, context.sent_pages)
        context.ends.callback(audit.close)
        return audit

    def _make_cache(self) -> XbzrleCache | None:
        """
        :raise RamError: When the user asked for one, and the host refuses the memory or has too little left.
        """
        context = self._context
        cache = self._wanted_cache()
        if cache is not None:
            context.ends.callback(cache.close)
            context.progress.note(xbzrle=cache.statistics)
        return cache

    def _wanted_cache(self) -> XbzrleCache | None:
        """The XBZRLE cache, if the user asked for one or left it to the policy."""
        context, parameters = self._context, self._context.parameters
        blocks, own = context.guest.ram_blocks, parameters.policy.own
        copy = sum(block.size for block in blocks) if parameters.number("x-sterna-audit") else 0
        if parameters.has("xbzrle"):
            size = parameters.number("xbzrle-cache-size")
            return XbzrleCache(blocks, size, context.page_bits, from_start=own, audit_bytes=copy)
        # QEMU and sterna take XBZRLE whether or not they are told; who reads a file or a pipe is not known.
        if not (own and parameters.may_choose_xbzrle and isinstance(context.uri, uris.ListeningUri)):
            return None
        size = affordable_cache(blocks, copy)
        if context.multifd is not None or not size:
            return None
        try:
            return XbzrleCache(blocks, size, context.page_bits, from_start=True)
        except RamError:
            return None

    def _page_sender(self, channel: Channel, cache: XbzrleCache | None) -> PageSender:
        context = self._context
        transport: Transport = RecordTransport(channel, context.limiter, context.page_bits)
        if context.multifd is not None:
            assert isinstance(context.uri, uris.ListeningUri)
            transport = MultifdTransport(
                channel,
                context.uri,
                context.multifd,
                context.limiter,
                context.page_bits,
                context.cancellation,
            )
        return PageSender(transport, context.limiter, cache)

    def _start_digest(self) -> RollingDigest:
        digest = RollingDigest(self._context.guest.ram_blocks)
        self._context.ends.callback(digest.close)
        digest.start()
        return digest

    # -- what is agreed on -----------------------------------------------------------------------------------

    def _check_multifd(self, greeted: Greeted, cache: XbzrleCache | None) -> None:
        if self._context.multifd is None or cache is None:
            return
        if handshake.FEATURE_MULTIFD_XBZRLE not in greeted.features:
            kind = greeted.kind.value or "one-way channel"
            raise MigrationError(
                f"the capabilities multifd and xbzrle together need a sterna at the destination, and this is a {kind}: "
                "switch one of them off"
            )

    def _agree(self, peer: Peer, greeted: Greeted) -> bool:
        """
        :return: whether both ends compare digests of RAM
        """
        context = self._context
        if greeted.kind is PeerKind.STERNA:
            difference = first_difference(context.guest.guest_traits(), greeted.host)
            if difference is not None:
                raise Refused(f"the destination's host cannot run this guest: {difference}")
            multifd = context.multifd
            channels, token = (multifd.channels, multifd.token.hex()) if multifd else (0, "")
            context.outcome_query.watch = process.watch(greeted.process)
            own = context.process.identity if context.outcome_query.watch is not None else None
            verifies = self._verifies(greeted)
            peer.offer(Offer(context.migration_id.hex, verifies, channels, token, own))
            return verifies
        verifies = self._verifies(greeted)
        if verifies and greeted.kind is PeerKind.QEMU:
            raise MigrationError(
                "x-sterna-verify is on, but the destination cannot verify: it is not a sterna"
            )
        return verifies

    def _verifies(self, greeted: Greeted) -> bool:
        wanted = self._context.parameters.verify
        able = handshake.FEATURE_DIGEST in greeted.features
        if wanted is Verify.ON and greeted.kind is PeerKind.STERNA and not able:
            raise MigrationError("x-sterna-verify is on here, but off at the destination")
        return wanted is Verify.ON or (wanted is Verify.AUTO and able)
