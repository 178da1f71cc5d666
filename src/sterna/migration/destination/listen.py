"""Waiting for a guest: the listener, and what each connection to it turns out to be.

A connection brings a migration stream, or the pages of one (`sterna.migration.destination.multifd`), or the question who runs a
guest (`sterna.migration.outcome_query`). One stream is taken in at a time, questions are answered beside it. After a failure the
listener goes on waiting for another attempt; after a success it stays until the source has confirmed. A source that falls silent
is given up, so that it does not keep others out for ever.
"""

import threading
import time
import uuid
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from enum import Enum

from sterna.migration import handshake, outcome_query
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.sockets import Listener, SocketChannel
from sterna.migration.destination.context import DestinationContext, Wait
from sterna.migration.destination.multifd.pending import PendingChannels
from sterna.migration.destination.run import Destination
from sterna.migration.errors import Cancelled, ChannelError
from sterna.migration.guest import MigratableGuest
from sterna.migration.outcome_query import OutcomeRecord
from sterna.migration.parameters import Parameters
from sterna.migration.process import ProcessWatch
from sterna.migration.progress import Emit, Progress
from sterna.migration.statistics import MigrationInfo, MigrationStatus
from sterna.ownership import Event, OwnershipState
from sterna.stream import sections
from sterna.stream.multifd.format import INIT_BYTES, MAGIC, decode_init
from sterna.stream.return_path import ReturnMessage
from sterna.stream.wire import Command, StreamError

_HEAD_BYTES = len(outcome_query.QUESTION)
_MULTIFD = MAGIC.to_bytes(4, "big")
_HEAD_SECONDS = 10.0
_GREETING = sections.command(Command.PING, handshake.GREETING.to_bytes(4, "big"))
_GREETING_LIMIT = 1 << 16
_GREETING_SECONDS = 2.0
_CONNECTION_LIMIT = 8
_SLOT_SECONDS = 5.0
SILENCE_SECONDS = 60.0
"""How long a source that connected may send nothing, or less than a page, before it makes room for another. The slowest paced
source sends a page in this time (max-bandwidth of 69 bytes/s); one that has been stopped does not.
"""
_ROOM_SECONDS = 1.0
"""How long connections that end may take to make room for another."""
_ACCEPT_SECONDS = 1.0
"""How long to wait after the listening socket failed, when it must not be closed."""


class _Slot(Enum):
    """Whether a stream can be taken in."""

    FREE = "free"
    BUSY = "busy"
    TAKEN = "taken"
    """The guest runs here; there is no room for another."""
    CLOSED = "closed"


class Incoming:
    """A wait for a guest on one URI, in threads of its own.

    :raise ChannelError: When the URI cannot be listened on or opened.
    """

    def __init__(
        self, guest: MigratableGuest, uri: uris.Uri, parameters: Parameters, record: OutcomeRecord, emit: Emit
    ) -> None:
        self._guest = guest
        self._uri = uri
        self._parameters = parameters
        self._emit = emit
        self._record = record
        self._cancellation = Cancellation()
        self._enough = Cancellation()
        self._slot = _Slot.FREE
        self._watch: ProcessWatch | None = None
        self._connections: set[threading.Thread] = set()
        self._strangers: list[SocketChannel] = []
        """Connections that have not said what they want, the oldest first."""
        self._changed = threading.Condition()
        self._listener: Listener | None = None
        self._pending_channels = PendingChannels()
        self._progress = self._new_progress()
        with ExitStack() as undo:
            undo.callback(self._cancellation.close)
            undo.callback(self._enough.close)
            if isinstance(uri, uris.ListeningUri):
                self._listener = undo.enter_context(uri.listen())
                run: Callable[[], None] = self._listen
            else:
                channel = undo.enter_context(uri.open_incoming(self._cancellation))
                run = lambda: self._take_in(channel, b"")  # noqa: E731
            self._wait = Wait(
                guest,
                parameters,
                record,
                uuid.uuid4(),
                self._cancellation,
                # Whoever set up a one-way channel, or a connection of his own, keeps no one else out.
                SILENCE_SECONDS if self._listener else None,
                self._pending_channels if self._listener else None,
            )
            self._progress.enter(MigrationStatus.SETUP)
            self._thread = threading.Thread(target=run, name="incoming", daemon=True)
            try:
                self._thread.start()
            except RuntimeError as error:  # the operating system has no thread to spare
                raise ChannelError(f"{uri} cannot be waited at: {error}") from error
            undo.pop_all()

    @property
    def uri(self) -> str:
        """Where it listens: connect to this."""
        return self._listener.uri if self._listener else str(self._uri)

    def info(self) -> MigrationInfo:
        """The present or last attempt."""
        info = self._progress.snapshot()
        arrived = self._guest.ownership.state is OwnershipState.ARRIVED
        info = replace(info, in_doubt=info.in_doubt and arrived)
        return replace(info, socket_address=self.uri) if self._listener else info

    @property
    def finished(self) -> bool:
        """Nothing more will come of it: a one-way channel has had its attempt, a listener has closed."""
        if self._listener is None:
            return not self._progress.snapshot().status.running
        return not self._thread.is_alive()

    def wait(self, timeout: float | None = None) -> MigrationInfo:
        """Wait until an attempt has an outcome, for so many seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: not self._progress.snapshot().status.running, timeout)
        return self.info()

    def refuse(self) -> None:
        """Stop waiting; an attempt under way is given up, and its source told, while the caller goes on."""
        self._set_slot(_Slot.CLOSED)
        self._cancellation.set()
        self._enough.set()

    def close(self) -> None:
        """Stop waiting; an attempt under way is given up. Returns when all threads have ended."""
        self.refuse()
        self._thread.join()
        self._pending_channels.close()
        for thread in list(self._connections):
            thread.join()
        self._cancellation.close()
        self._enough.close()
        if self._watch is not None:
            self._watch.close()

    # -- threads ---------------------------------------------------------------------------------------------

    def _new_progress(self) -> Progress:
        return Progress(self._announce, str(self._uri), incoming=True)

    def _announce(self, name: str, data: dict[str, object]) -> None:
        try:
            self._emit(name, data)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _listen(self) -> None:
        assert self._listener is not None
        with self._listener as listener:
            while True:
                try:
                    channel = listener.accept(self._enough, self._cancellation)
                except Cancelled:
                    return
                except ChannelError as error:
                    if self._close_free_slot():
                        if self._progress.snapshot().status.running:
                            self._progress.enter(MigrationStatus.FAILED, error=str(error))
                        return
                    try:
                        self._enough.sleep(_ACCEPT_SECONDS)
                    except Cancelled:
                        return
                    continue
                if self._is_full():
                    self._make_room()
                with self._changed:
                    if self._is_full():
                        channel.close()
                        continue
                    thread = threading.Thread(
                        target=self._serve, args=(channel,), name="incoming-connection", daemon=True
                    )
                    try:
                        thread.start()
                    except RuntimeError:  # the operating system has no thread to spare
                        channel.close()
                        continue
                    self._connections.add(thread)
                    self._strangers.append(channel)

    def _is_full(self) -> bool:
        """Whether there are as many connections as may be. All channels of a migration may connect at once."""
        with self._changed:
            self._connections = {thread for thread in self._connections if thread.is_alive()}
            return len(self._connections) >= _CONNECTION_LIMIT + self._parameters.multifd_channels

    def _make_room(self) -> None:
        """Wait a moment for the ends of connections whose peers have gone, or of the oldest that has not said what it wants: a
        source that comes right behind them is welcome.
        """
        self._pending_channels.sweep()
        with self._changed:
            if self._is_full() and self._strangers:
                self._strangers.pop(0).shut_down()
        deadline = time.monotonic() + _ROOM_SECONDS
        while self._is_full() and time.monotonic() < deadline:
            for thread in list(self._connections):
                thread.join(max(0.0, min(_ROOM_SECONDS / 100, deadline - time.monotonic())))

    def _serve(self, channel: SocketChannel) -> None:
        """Find out what a connection wants."""
        with ExitStack() as stack:
            stack.enter_context(channel)
            try:
                head = self._read_exactly(channel, _HEAD_BYTES)
                if not head:
                    return  # only looked whether somebody listens
                if head.startswith(_MULTIFD):
                    init = decode_init(head + self._read_exactly(channel, INIT_BYTES - len(head)))
                    if self._is_known(channel):
                        stack.pop_all()
                        self._pending_channels.enter(init, channel)
                    return
                if head in (outcome_query.QUESTION, outcome_query.CONFIRMATION, outcome_query.CANCELLATION):
                    migration_id = self._read_exactly(channel, outcome_query.ID_BYTES)
                    if len(migration_id) < outcome_query.ID_BYTES or not self._is_known(channel):
                        return
                    if head == outcome_query.QUESTION:
                        outcome_query.answer(channel, self._record, migration_id)
                    elif head == outcome_query.CONFIRMATION:
                        self._confirm(migration_id)
                    else:
                        self._record.note_cancelled(migration_id)
                    return
                if not self._is_known(channel):
                    return
            except (ChannelError, Cancelled, StreamError):
                return
            finally:
                self._is_known(channel)  # or never will be
            self._take_in(channel, head)

    def _is_known(self, channel: SocketChannel) -> bool:
        """It is known what a connection wants. False when it was, or when it took too long and has made room."""
        with self._changed:
            if channel not in self._strangers:
                return False
            self._strangers.remove(channel)
            return True

    def _confirm(self, migration_id: bytes) -> None:
        """A source that had lost the connection knows now that its guest runs here."""
        if self._record.confirms(migration_id):
            self._guest.ownership.apply(Event.CONFIRMED, migration_id)
            self._enough.set()

    def check_source(self) -> None:
        """A source that has ended asks no more, and takes nothing for the end of the guest."""
        watch, migration = self._watch, self._guest.ownership.hold.migration
        if watch is not None and watch.ended:
            self._guest.ownership.apply(Event.SOURCE_ENDED, migration)

    def _read_exactly(self, channel: Channel, size: int) -> bytes:
        """So many bytes; fewer when the peer ends or falls silent before."""
        data = bytearray(size)
        got = 0
        deadline = time.monotonic() + _HEAD_SECONDS
        while got < size and channel.wait_readable(deadline - time.monotonic()):
            more = channel.readinto_now(memoryview(data)[got:])
            if more == 0:
                break
            got += more or 0
        return bytes(data[:got])

    def _take_in(self, channel: Channel, head: bytes) -> None:
        with channel:
            slot = self._enter_slot()
            if slot is not _Slot.FREE:
                self._turn_away(channel, head, slot)
                return
            context: DestinationContext | None = None
            try:
                if not self._progress.snapshot().status.running:
                    self._progress = self._new_progress()
                    self._progress.enter(MigrationStatus.SETUP)
                self._progress.note(source=channel.peer)
                context = DestinationContext(self._wait, channel, head, self._progress)
                Destination(context).run()
            finally:
                runs = self._guest.ownership.state is not OwnershipState.ABSENT
                watch = context.watch if context is not None else None
                if runs:
                    self._watch = watch
                elif watch is not None:
                    watch.close()
                self._set_slot(_Slot.TAKEN if runs else _Slot.FREE)
        if runs and context is not None and context.confirmed:
            self._enough.set()

    def _enter_slot(self) -> _Slot:
        """Wait a little for the end of an attempt under way: after a failure, the next one comes at once.

        :return: how the slot was found; FREE when it is the caller's now
        """
        with self._changed:
            self._changed.wait_for(lambda: self._slot is not _Slot.BUSY, _SLOT_SECONDS)
            found = self._slot
            if found is _Slot.FREE:
                self._slot = _Slot.BUSY
            return found

    def _turn_away(self, channel: Channel, head: bytes, slot: _Slot) -> None:
        """Say why to a sterna, which greets; anyone else is only left."""
        reasons = {
            _Slot.BUSY: "busy: another guest is coming in here",
            _Slot.TAKEN: "busy: a guest that came in runs here already",
        }
        if slot not in reasons:
            return
        data, buffer = bytearray(head), bytearray(1 << 12)
        deadline = time.monotonic() + _GREETING_SECONDS
        try:
            while _GREETING not in data:
                # What has come is read even when the time is over: unread, it would reset the connection.
                left = deadline - time.monotonic()
                if len(data) > _GREETING_LIMIT or not channel.wait_readable(left):
                    return
                got = channel.readinto_now(buffer)
                if got == 0:
                    return
                data += buffer[: got or 0]
            nack = handshake.encode(handshake.Nack(reasons[slot]))
            channel.send(ReturnMessage(handshake.PrivateMessage.NACK, nack).encode())
            channel.end_writing()
            channel.drain()
        except (ChannelError, Cancelled):
            pass  # it has gone, or this wait for a guest has ended

    def _close_free_slot(self) -> bool:
        """No guest may come in any more, unless one does or did.

        :return: False when the source of that guest may still ask whether it runs here, and stays in doubt if it finds nobody
        """
        with self._changed:
            if self._slot in (_Slot.BUSY, _Slot.TAKEN):
                return False
            self._slot = _Slot.CLOSED
            return True

    def _set_slot(self, slot: _Slot) -> None:
        with self._changed:
            if self._slot is not _Slot.CLOSED:
                self._slot = slot
            self._changed.notify_all()
