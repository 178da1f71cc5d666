"""Receiving a guest while it runs at the source, and after it has stopped: RAM into place, devices aside."""

from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack

from sterna.memory.digest import RamDigest
from sterna.migration import verify
from sterna.migration.destination.context import DestinationContext
from sterna.migration.destination.greeting import Greeting
from sterna.migration.destination.load import Arrived, Load
from sterna.migration.phase import Phase
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.reader import CommandPiece, EndOfStream, Event, SectionPiece
from sterna.stream.vmstate import DeviceState
from sterna.stream.wire import RAM_SECTION, RAM_VERSION, SectionType


class Receive(Phase):
    """Reads sections up to the stream's end.

    :param page_bits: log2 of the stream's page size
    :param first: what follows the set up
    """

    def __init__(
        self, context: DestinationContext, greeting: Greeting, page_bits: int, first: Event | None
    ) -> None:
        self._context, self._greeting, self._first = context, greeting, first
        self._page_bits = page_bits
        guest, unmatched = context.guest, context.unmatched
        self._decoder = RamDecoder(guest.ram_blocks, page_bits, fresh=True, adopt=unmatched.adopt)
        for block in guest.ram_blocks:
            self._decoder.written[block.name] = context.digest.marks(block.name)
        self._ram_ended = False
        self._multifd_pages = 0
        self._devices: list[DeviceState] = []
        self._their_digest: RamDigest | None = None
        self._their_devices_digest = 0

    def run(self, stack: ExitStack) -> Load:
        context, greeting, reader = self._context, self._greeting, self._context.reader
        pool = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="digest"))
        digest: Future[RamDigest] | None = None
        event = self._first
        while not isinstance(event, EndOfStream):
            match event:
                case SectionPiece() as piece:
                    self._read_section(piece)
                    if self._ram_ended and digest is None and greeting.verifies:
                        # All of RAM is here: the digest is made while the devices arrive.
                        digest = pool.submit(context.digest.finish, check=context.cancellation.check)
                case CommandPiece() as command:
                    greeting.obey(command)
                case _:
                    raise reader.error(f"unexpected {type(event).__name__} before the end of the stream")
            event = reader.next()
        if not self._ram_ended:
            raise reader.error("the stream ends without the last part of the ram section")
        if greeting.greeted and greeting.offer is None:
            raise reader.error("the source never named the migration")
        arrived = Arrived(
            self._decoder.received,
            self._page_bits,
            self._devices,
            self._their_digest,
            self._their_devices_digest,
            digest,
        )
        return Load(context, greeting, arrived)

    def _read_section(self, piece: SectionPiece) -> None:
        context, header, greeting = self._context, piece.header, self._greeting
        reader, descriptions = context.reader, context.guest.descriptions
        if header.name in (RAM_SECTION, verify.SECTION.name) and header.instance_id:
            raise reader.error("there is only instance 0 of this section")
        if header.name == RAM_SECTION:
            self._read_ram(piece)
        elif piece.type is not SectionType.FULL:
            raise reader.error("only the ram section may come in parts")
        elif header.name == verify.SECTION.name:
            if greeting.greeted and not greeting.verifies:
                raise reader.error("digests of guest RAM, which the source did not offer")
            state = reader.read_state(verify.section_for(context.guest.ram_blocks))
            self._their_digest, self._their_devices_digest = verify.from_state(state)
        elif header.name in descriptions:
            self._devices.append(reader.read_state(descriptions[header.name]))
        elif greeting.greeted:
            raise reader.error("this machine has no such device")
        else:
            context.unmatched.take_section(reader, header)

    def _read_ram(self, piece: SectionPiece) -> None:
        context, reader, decoder = self._context, self._context.reader, self._decoder
        if piece.header.version != RAM_VERSION:
            raise reader.error(
                f"version {piece.header.version} of the section; only {RAM_VERSION} is supported"
            )
        match piece.type:
            case SectionType.START:
                decoder.read_setup(reader)
                blocks = (*context.guest.ram_blocks, *context.unmatched.ram_blocks)
                context.multifd.begin(blocks, self._page_bits, decoder.written)
                self._sync_channels(last=False)
            case SectionType.PART | SectionType.END:
                before = decoder.statistics()
                decoder.read_records(reader)
                multifd_bytes = self._sync_channels(last=piece.type is SectionType.END)
                now = decoder.statistics()
                normal = now.normal + self._multifd_pages
                context.progress.received(now.bytes - before.bytes + multifd_bytes, normal, now.duplicate)
                self._ram_ended = piece.type is SectionType.END
                context.unmatched.check_block(decoder.block)
            case _:
                raise reader.error("the section must come in parts")

    def _sync_channels(self, *, last: bool) -> int:
        """What follows an EOS waits for what the multifd channels have before it.

        :return: bytes that came on them since the EOS before
        """
        context = self._context
        came = context.multifd.sync(context.wait.silence_seconds, self._decoder.received, last=last)
        self._multifd_pages += came.pages
        return came.size
