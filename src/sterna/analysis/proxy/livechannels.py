"""The channels of a migration that goes through a proxy, for its analysis."""

from collections.abc import Callable, Sequence
from typing import Protocol

from sterna.analysis.channel_survey import ChannelInput
from sterna.analysis.proxy.tee import TeeReader
from sterna.migration import handshake
from sterna.migration.errors import ProtocolError
from sterna.migration.handshake import Offer, PrivateCommand
from sterna.stream.multifd.format import decode_init
from sterna.stream.reader import CommandPiece
from sterna.stream.wire import StreamError


class Connected(Protocol):
    """The connections of a proxy."""

    def channels(self, is_own: Callable[[bytes], bool]) -> Sequence[tuple[str, TeeReader]]: ...

    def wait_ready(self, readers: Sequence[TeeReader]) -> TeeReader: ...

    def close_channels(self) -> None: ...


class LiveChannels:
    """The channels that have connected, without foreign ones. The source, if it is a sterna, says on the main stream what its own
    begin with; waiting for any other would be in vain.

    :param main: reads the main stream
    """

    def __init__(self, proxy: Connected, main: TeeReader) -> None:
        self._proxy = proxy
        self._main = main
        self._offer: Offer | None = None
        self._begun = False
        self._readers: dict[str, TeeReader] = {}

    def note(self, command: CommandPiece) -> None:
        # Before guest RAM: what has been taken for a channel stays one.
        if command.kind == PrivateCommand.OFFER and not self._begun:
            try:
                self._offer = handshake.decode(command.payload, Offer)
            except ProtocolError:
                pass  # the destination refuses it

    def sources(self) -> list[ChannelInput]:
        self._begun = True
        self._readers = dict(self._proxy.channels(self._is_own))
        return [ChannelInput(label, reader) for label, reader in self._readers.items()]

    def wait(self, labels: Sequence[str], *, main: bool) -> str | None:
        candidates = {self._readers[label]: label for label in labels}
        ready = self._proxy.wait_ready([*([self._main] if main else []), *candidates])
        return candidates.get(ready)

    def close(self) -> None:
        self._proxy.close_channels()

    def _is_own(self, opening: bytes) -> bool:
        """:param opening: a channel's initial packet"""
        if self._offer is None:
            return True
        try:
            token = decode_init(opening).token.hex()
        except StreamError:
            return False
        return self._offer.multifd > 0 and self._offer.token in ("", token)
