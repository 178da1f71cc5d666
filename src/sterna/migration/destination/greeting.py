"""What the source says of itself and of the migration, between the pages, and what it is answered."""

import time
import uuid
from collections.abc import Callable
from typing import NoReturn

from sterna.migration import handshake, process
from sterna.migration.destination.context import DestinationContext
from sterna.migration.errors import Refused
from sterna.migration.handshake import Hello, Offer, PrivateCommand, PrivateMessage
from sterna.migration.parameters import Verify
from sterna.stream.reader import CommandPiece
from sterna.stream.return_path import pong
from sterna.stream.wire import Command, StreamError


class Greeting:
    """Obeys the source's commands.

    :ivar commands: by kind, how each is obeyed
    :ivar configuration_error: what keeps the guest out; said as soon as the source can hear it
    :ivar return_path: the source listens
    :ivar greeted: the source is a sterna
    :ivar offer: how a sterna names the migration; None until it has
    :ivar id: of the migration, 16 bytes; empty until the source has named it
    """

    def __init__(self, context: DestinationContext) -> None:
        self._context = context
        self.commands: dict[int, Callable[[CommandPiece], None]] = {
            Command.OPEN_RETURN_PATH: self._open_return_path,
            Command.PING: self._take_ping,
            PrivateCommand.OFFER: self._take_offer,
        }
        self.configuration_error: StreamError | None = None
        self.return_path = False
        self.greeted = False
        self.offer: Offer | None = None
        self.id = b""
        self._pass_began = time.monotonic()

    @property
    def verifies(self) -> bool:
        """Whether the source has offered digests of RAM."""
        return self.offer is not None and self.offer.verify

    def obey(self, command: CommandPiece) -> None:
        """
        :raise StreamError: When the command is unknown, or does not belong here.
        """
        self.commands.get(command.kind, self._refuse)(command)

    def require_configuration(self) -> None:
        """
        :raise StreamError: When the source's configuration does not fit.
        """
        if self.configuration_error is not None:
            raise self.configuration_error

    def _refuse(self, command: CommandPiece) -> NoReturn:
        raise self._context.reader.error(f"command {command.kind:#x} is not supported here")

    def _open_return_path(self, command: CommandPiece) -> None:
        self.return_path = self._context.channel.two_way

    def _take_ping(self, command: CommandPiece) -> None:
        value = int.from_bytes(command.payload, "big")
        if not self.return_path:
            return
        if value == handshake.GREETING and not self.greeted:
            self.greeted = True
            self.require_configuration()
            self._context.progress.note(peer="sterna")
            self._context.answer(PrivateMessage.HELLO, self._hello())
        elif self.verifies:
            self._catch_up()
        self._context.channel.send(pong(value).encode())

    def _catch_up(self) -> None:
        """A pass has ended, and the source waits for the answer to its ping."""
        self._context.digest.catch_up_after(time.monotonic() - self._pass_began)
        self._pass_began = time.monotonic()

    def _hello(self) -> Hello:
        context = self._context
        able = context.parameters.verify is not Verify.OFF
        features = [*handshake.FEATURES, *((handshake.FEATURE_DIGEST,) if able else ())]
        features += [handshake.FEATURE_MULTIFD_XBZRLE, handshake.FEATURE_CANCEL]
        host = dict(context.guest.host_traits())
        own = context.process.identity
        return Hello(handshake.VERSION, features, context.wait.id.hex, time.time_ns(), host, own)

    def _take_offer(self, command: CommandPiece) -> None:
        context = self._context
        if not self.greeted or self.offer is not None:
            self._refuse(command)
        offer = handshake.decode(command.payload, Offer)
        try:
            migration_id = uuid.UUID(hex=offer.migration_id)
        except ValueError:
            raise context.reader.error(f"{offer.migration_id!r:.60} is not the id of a migration") from None
        if not offer.verify and context.parameters.verify is Verify.ON:
            raise Refused("x-sterna-verify is on here, but off at the source")
        self._check_channels(offer.multifd)
        try:
            context.multifd.recognise(bytes.fromhex(offer.token))
        except ValueError:
            raise context.reader.error(f"{offer.token!r:.60} is not the token of multifd channels") from None
        if not context.record.begin(migration_id.bytes):
            raise Refused(f"migration {migration_id} was tried here before; an id is good for one attempt")
        self.id = migration_id.bytes
        self.offer = offer
        context.watch = process.watch(offer.process)
        context.progress.note(migration_id=str(migration_id))
        if offer.verify:
            context.digest.start()

    def _check_channels(self, theirs: int) -> None:
        ours = self._context.multifd.count
        if theirs and not ours:
            raise Refused("multifd is on at the source, but off here")
        if ours and not theirs:
            raise Refused("multifd is on here, but off at the source")
        if theirs != ours:
            raise Refused(f"multifd-channels is {theirs} at the source, {ours} here")
