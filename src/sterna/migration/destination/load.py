"""Loading a guest that has arrived: all of it is there, and as it was sent."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass

from sterna.memory.bitmap import Words, full_bitmap
from sterna.memory.digest import RamDigest, page_digests
from sterna.migration import verify
from sterna.migration.destination.context import DestinationContext
from sterna.migration.destination.greeting import Greeting
from sterna.migration.destination.start import Start, StartAtEnd, StartOnCommit
from sterna.migration.errors import VerificationError
from sterna.migration.handshake import Nack
from sterna.migration.phase import Phase
from sterna.stream.reader import VmDescription
from sterna.stream.vmstate import DeviceState


class RamMismatch(VerificationError):
    """Guest RAM differs; `nack` has the details for the source."""

    def __init__(self, nack: Nack) -> None:
        super().__init__(nack.reason)
        self.nack = nack


@dataclass(frozen=True)
class Arrived:
    """What the stream has brought up to its end.

    :ivar received: by RAM block, a bitmap of the stream's pages that have come
    :ivar page_bits: log2 of their size
    :ivar their_digest: of RAM as the source had it; None when it does not say
    :ivar their_devices_digest: of the device sections
    :ivar digest: of RAM as it is here, once it is made; None when it is not being made
    """

    received: Mapping[str, Words]
    page_bits: int
    devices: Sequence[DeviceState]
    their_digest: RamDigest | None
    their_devices_digest: int
    digest: "Future[RamDigest] | None"


class Load(Phase):
    """Compares digests, where there are any, and loads the devices."""

    def __init__(self, context: DestinationContext, greeting: Greeting, arrived: Arrived) -> None:
        self._context, self._greeting, self._arrived = context, greeting, arrived

    def run(self, stack: ExitStack) -> Start:
        context = self._context
        self._check_complete()
        left_behind = context.unmatched.judge(self._read_description())
        context.progress.note(left_behind=left_behind)
        digest = self._compare()
        context.guest.load_devices(self._arrived.devices, context.parameters.ignored_sections)
        if self._greeting.offer is None:
            return StartAtEnd(context, self._greeting)
        return StartOnCommit(context, self._greeting, digest)

    def _check_complete(self) -> None:
        context, bits = self._context, self._arrived.page_bits
        for block in (*context.guest.ram_blocks, *context.unmatched.ram_blocks):
            missing = full_bitmap(block.size >> bits) & ~self._arrived.received[block.name]
            if missing.any():
                word = int((missing != 0).argmax())
                lowest = int(missing[word])
                page = word * 64 + (lowest & -lowest).bit_length() - 1
                raise context.reader.error(f"RAM block {block.name!r}: page at {page << bits:#x} never came")

    def _read_description(self) -> bytes | None:
        """Read what follows the end, so that the source can finish writing it."""
        reader = self._context.reader
        # A source that could not send it whole may go on: a file is whole where it ends, a connection is not.
        event = reader.next()
        if event is None and self._context.channel.two_way:
            raise reader.error(
                "the stream is cut short before its description (a QEMU sends it unless its machine has suppress-vmdesc=on)"
            )
        return event.text if isinstance(event, VmDescription) else None

    def _compare(self) -> RamDigest | None:
        """Compare digests, if the source sent any.

        :raise VerificationError: When RAM differs.
        """
        context, theirs = self._context, self._arrived.their_digest
        if theirs is None:
            if self._greeting.verifies:
                raise context.reader.error("the source agreed to send digests of guest RAM, and did not")
            return None
        descriptions = context.guest.descriptions
        devices = verify.devices_digest(
            (state, descriptions[state.name].encode(state)) for state in self._arrived.devices
        )
        if devices != self._arrived.their_devices_digest:
            raise VerificationError("the device sections are not what the source sent: their digest differs")
        ours = self._our_digest()
        context.progress.note(ram_digest_source=theirs.hex, ram_digest_destination=ours.hex)
        different = verify.compare(theirs, ours)
        context.progress.note(verified=different is None)
        if different is None:
            return ours
        pages = b""
        if different.chunk >= 0:
            block = next(b for b in context.guest.ram_blocks if b.name == different.block)
            pages = page_digests(block, different.chunk).astype(">u8").tobytes()
        reason = f"guest RAM differs from the source's: {different}"
        raise RamMismatch(Nack(reason, different.block, different.chunk, pages, ours.hex))

    def _our_digest(self) -> RamDigest:
        if self._arrived.digest is not None:
            return self._arrived.digest.result()
        return self._context.digest.finish(check=self._context.cancellation.check)
