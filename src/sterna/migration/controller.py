"""Migrations of one machine: starting them, cancelling them, and saying how they go."""

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sterna.host.closing import Closing
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.destination.listen import Incoming
from sterna.migration.errors import MigrationError, StateError
from sterna.migration.guest import MigratableGuest
from sterna.migration.outcome_query import OutcomeRecord
from sterna.migration.parameters import Parameters, Value
from sterna.migration.progress import Emit, Progress
from sterna.migration.source.context import SourceContext
from sterna.migration.source.run import Source
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.migration.transport.work import HeatMap
from sterna.ownership import OwnershipState

DEFER = "defer"
"""What `incoming` takes instead of a URI: the URI comes later."""


class MigrationController(Closing):
    """The migrations of one guest, at most one at a time. Calls may come from any thread.

    :param emit: gets the events MIGRATION and MIGRATION_PASS, on a migration's thread, when the capability
        `events` is on
    :param observe: gets them whether or not it is on
    """

    def __init__(
        self,
        guest: MigratableGuest,
        emit: Emit = lambda name, data: None,
        observe: Emit = lambda name, data: None,
    ) -> None:
        self._guest = guest
        self._emit_to = emit
        self._observe = observe
        self._lock = threading.Lock()
        self._asked = threading.Condition(self._lock)
        self._asking = False
        self._closing = Cancellation()
        self._closed = False
        self._parameters = Parameters(self._parameters_changed)
        self._source: Source | None = None
        self._thread: threading.Thread | None = None
        self._incoming: Incoming | None = None
        self._record = OutcomeRecord()  # outlives a listener: a source may ask at the next one
        self._deferred = False

    # -- outgoing --------------------------------------------------------------------------------------------

    def migrate(self, uri: str, resume: bool = False) -> None:
        """Start to migrate the guest to `uri`, in a thread of its own; `wait` for the outcome.

        Whether there is a guest to migrate is known before anything is opened or connected.

        :raise Exception: The machine's own, when it has no guest that may go.
        :raise UriError: When the URI is malformed, or nobody can wait there.
        :raise StateError: When a migration is in progress, or this machine waits for a guest, or the capability
            multifd is on and the URI is not one that can be connected to more than once.
        """
        target = uris.parse_destination(uri)
        if resume:
            raise StateError("a migration cannot be resumed: postcopy is not implemented")
        with self._lock:
            self._check_channels(target)
            self._check_open()
            self._check_not_asking()
            self._check_owner()
            if self._source is not None and self._source.context.progress.snapshot().status.running:
                raise StateError("there is a migration process in progress")
            if self._deferred or (
                self._incoming is not None
                and self._guest.ownership.state is OwnershipState.ABSENT
                and not self._incoming.finished
            ):
                raise StateError("guest is waiting for an incoming migration")
            self._guest.check_migratable()
            self._end_source()
            progress = Progress(self._emit, uri)
            source = Source(SourceContext(self._guest, target, self._parameters, progress, self._closing))
            # The status is there when the call returns: whoever asks next sees this migration.
            progress.enter(MigrationStatus.SETUP)
            self._source = source
            self._parameters_changed()  # they may have since it was made
            thread = threading.Thread(target=source.run, name="migration", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # the operating system has no thread to spare
                source.abandon(str(error))
                raise MigrationError(f"the migration cannot be started: {error}") from error
            self._thread = thread

    def cancel(self) -> None:
        """Cancel the outgoing migration; does nothing when there is none. `wait` for the outcome."""
        source = self._source
        if source is not None:
            source.cancel()

    def wait(self, timeout: float | None = None) -> MigrationInfo:
        """Wait for the outcome of the outgoing migration, or of the attempt to take one in.

        :param timeout: seconds; the snapshot may show a migration in progress after it
        """
        thread, incoming = self._thread, self._incoming
        if thread is not None:
            thread.join(timeout)
        elif incoming is not None:
            incoming.wait(timeout)
        return self.info()

    # -- incoming --------------------------------------------------------------------------------------------

    def incoming(self, uri: str) -> str:
        """Wait for a guest from `uri`, or with ``defer`` for a later call that gives one.

        :return: the URI to connect to, its port filled in
        :raise UriError: When the URI is malformed.
        :raise StateError: When this machine waits for a guest already, or has or had one.
        :raise ChannelError: When the URI cannot be listened on or opened.
        """
        target = None if uri == DEFER else uris.parse(uri)
        with self._lock:
            self._check_open()
            if self._incoming is not None:
                info = self._incoming.info()
                here = self._guest.ownership.state is not OwnershipState.ABSENT
                if here or info.status is MigrationStatus.COMPLETED or not self._incoming.finished:
                    raise StateError(
                        f"the incoming migration from {self._incoming.uri} has been started already"
                    )
            if self._guest.ownership.state is not OwnershipState.ABSENT:
                raise StateError(
                    "this machine has a guest already, or had one: only a new one can wait for another"
                )
            if self._incoming is not None:
                self._incoming.close()  # its outcome stays to be asked for, should the new address not be had
            if target is None:
                self._incoming = None
                self._deferred = True
                return uri
            self._incoming = Incoming(self._guest, target, self._parameters, self._record, self._emit)
            self._deferred = False
            return self._incoming.uri

    def refuse_guests(self) -> None:
        """The program ends: from now on no guest is taken over, whatever arrives. The source of one that is coming in is told;
        `close` waits for that. A guest that is here is not touched.
        """
        self._record.end()
        incoming = self._incoming
        if incoming is not None:
            incoming.refuse()

    # -- settings and state ----------------------------------------------------------------------------------

    def info(self) -> MigrationInfo:
        """The outgoing migration if there was one, else the incoming one."""
        source, incoming = self._source, self._incoming
        if source is not None:
            info = source.context.progress.snapshot()
            return replace(info, in_doubt=info.in_doubt and source.resolvable)
        if incoming is not None:
            return incoming.info()
        return MigrationInfo()

    def heat_maps(self, cells: int) -> list[HeatMap]:
        """How often the outgoing migration sent each part of RAM, at most so many cells a block; empty without one."""
        source = self._source
        return [] if source is None else source.context.sent_pages.heat_maps(cells)

    def incoming_info(self) -> MigrationInfo:
        """The incoming migration."""
        incoming = self._incoming
        return incoming.info() if incoming is not None else MigrationInfo()

    def capabilities(self) -> dict[str, bool]:
        """All capabilities by QEMU's names."""
        return self._parameters.capabilities()

    def asked_capabilities(self) -> frozenset[str]:
        """Those of which the user has said whether they are on."""
        return self._parameters.asked_capabilities

    def set_capabilities(self, changes: Mapping[str, bool | None]) -> None:
        """As `Parameters.set_capabilities`.

        :raise ParameterError: When a name is unknown, or a capability to be enabled is not implemented.
        :raise StateError: When a migration is in progress.
        """
        with self._lock:
            if self.info().status.running and self._source is not None:
                raise StateError("there is a migration process in progress")
            self._parameters.set_capabilities(changes)

    def parameters(self) -> dict[str, Value]:
        """All parameters by QEMU's names."""
        return self._parameters.values()

    def set_parameters(self, changes: Mapping[str, object]) -> None:
        """Change parameters; `max-bandwidth` and `downtime-limit` also of a migration in progress.

        :raise ParameterError: When a name is unknown, or a value of the wrong type or outside its limits.
        """
        self._parameters.set(changes)

    def close(self) -> None:
        """Cancel what is in progress and wait until all threads have ended. The controller is of no use
        afterwards.
        """
        self._closing.set()
        self._record.end()
        with self._asked:
            if self._closed:
                return
            self._closed = True
            self._asked.wait_for(lambda: not self._asking)
        self.cancel()
        self._end_source()
        if self._incoming is not None:
            self._incoming.close()
        self._closing.close()

    # -- inside ----------------------------------------------------------------------------------------------

    def _emit(self, name: str, data: dict[str, Any]) -> None:
        self._observe(name, data)
        if self._parameters.has("events"):
            self._emit_to(name, data)

    def _parameters_changed(self) -> None:
        source = self._source
        if source is not None:
            source.context.limiter.rate = self._parameters.number("max-bandwidth")

    def _check_channels(self, uri: uris.Uri) -> None:
        if self._parameters.has("multifd") and not isinstance(uri, uris.ListeningUri):
            raise StateError(
                f"multifd is not supported by current protocol: it needs several connections, and {uri} is one; "
                "use tcp: or unix:, or switch multifd off"
            )

    def _check_owner(self) -> None:
        """
        :raise NotTheOwner: When the guest is not this machine's.
        :raise StateError: When its source has not confirmed that it came here.
        """
        ownership = self._guest.ownership
        if self._incoming is not None:
            self._incoming.check_source()
        if ownership.may_migrate or ownership.state is OwnershipState.ABSENT:
            return  # a machine that waits for a guest says so itself
        if ownership.hold.watched:
            raise StateError(
                "the source that the guest came from has not confirmed that it knows, and takes the end of this process for the "
                "guest's end: end that source ('quit' there), then migrate"
            )
        if ownership.state is OwnershipState.SAVED:
            raise StateError("the guest was saved, and stands still; 'cont' first, then migrate")
        ownership.require_owner()

    def resolve_doubt(self, uri: str | None = None) -> str:
        """Find out who runs the guest of a migration that ended in doubt. It stays stopped here, whatever the answer.

        :param uri: where the destination can be asked, when that is not where the guest was sent
        :return: what was found out, in one line
        :raise UriError: When the URI is malformed.
        :raise StateError: When no migration is in doubt.
        :raise InDoubt: When it still is.
        """
        address = None if uri is None else uris.parse_destination(uri)
        with self._lock:
            self._check_open()
            self._check_not_asking()
            source = self._source
            if source is None or source.context.progress.snapshot().status.running or not source.resolvable:
                raise StateError("no migration is in doubt")
            self._asking = True
        try:
            return source.resolve_doubt(address)
        finally:
            with self._asked:
                self._asking = False
                self._asked.notify_all()

    def _check_not_asking(self) -> None:
        if self._asking:
            raise StateError("the destination is being asked who runs the guest; wait for the answer")

    def _end_source(self) -> None:
        if self._thread is not None:
            self._thread.join()
        if self._source is not None:
            self._source.context.outcome_query.stop_watching()

    def _check_open(self) -> None:
        if self._closed:
            raise MigrationError("the machine has been closed")
