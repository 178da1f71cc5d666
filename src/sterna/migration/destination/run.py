"""The destination of a migration: one attempt to take in a guest from one channel.

RAM goes into place as it arrives. Devices are decoded as they arrive and loaded only when the whole stream is
there, RAM is complete, and the digests, where there are any, agree. A guest is started on COMMIT between two
sternas, and otherwise at the end of the stream. After any failure the guest's RAM is as if nothing had come.
"""

import logging
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import msgspec

from sterna.host.printable import describe
from sterna.memory.address import PAGE_SIZE
from sterna.memory.bitmap import full_bitmap
from sterna.memory.digest import RamDigest, page_digests
from sterna.memory.rollingdigest import RollingDigest
from sterna.migration import handshake, process, verify
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.channel import Channel
from sterna.migration.channels.streamsource import ChannelSource
from sterna.migration.destination.agreement import disagreement, page_bits
from sterna.migration.destination.leftovers import Leftovers
from sterna.migration.doubt import OutcomeRecord
from sterna.migration.errors import Cancelled, ChannelError, Refused, VerificationError
from sterna.migration.guest import Guest
from sterna.migration.handshake import (
    Commit,
    Hello,
    Nack,
    Offer,
    PrivateCommand,
    PrivateMessage,
    Ready,
    Running,
)
from sterna.migration.multifd.lobby import Lobby
from sterna.migration.multifd.receiver import MultifdReceiver
from sterna.migration.parameters import Parameters, Verify
from sterna.migration.process import OwnProcess, ProcessWatch
from sterna.migration.progress import Progress
from sterna.migration.statistics import MigrationStatus
from sterna.ownership import Event, Outcome, Standing
from sterna.stream.ram import RamDecoder
from sterna.stream.reader import CommandPiece, EndOfStream, SectionPiece, StreamReader, VmDescription
from sterna.stream.return_path import ReturnMessage, pong, shut
from sterna.stream.sections import Configuration
from sterna.stream.vmstate import DeviceState
from sterna.stream.wire import (
    RAM_SECTION,
    RAM_VERSION,
    Command,
    SectionType,
    StreamCut,
    StreamError,
)

log = logging.getLogger(__name__)

_ARRIVAL_SECONDS = 30.0
"""How long the guest may wait for its source's host to take what has the source give it up."""
_LAST_WORDS_SECONDS = 2.0
"""How long a source may not take what it has to hear. The few bytes have room where little else goes that way."""


class _Mismatch(VerificationError):
    """Guest RAM differs; `nack` has the details for the source."""

    def __init__(self, nack: Nack) -> None:
        super().__init__(nack.reason)
        self.nack = nack


@dataclass
class Destination:
    """One attempt. `run` does all of it on the caller's thread.

    :ivar head: bytes of the stream that were read already
    :ivar record: remembers who runs the guest, for a source that loses the connection
    :ivar incoming_id: names this wait for a guest in the greeting
    :ivar silence_seconds: how long the source may send nothing, or less than a page of guest RAM, before it is given up; None
        for ever
    :ivar lobby: where multifd channels arrive; None where there can be but one connection
    :ivar confirmed: the source knows that the guest runs here, or never asks
    :ivar watch: the source's process, when it states one that is on this host; the caller closes it
    """

    guest: Guest
    channel: Channel
    head: bytes
    parameters: Parameters
    progress: Progress
    record: OutcomeRecord
    incoming_id: uuid.UUID
    cancellation: Cancellation
    silence_seconds: float | None = None
    lobby: Lobby | None = None
    confirmed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self._accepted = time.monotonic_ns()
        # With multifd the pages come on other channels, and little on this one.
        least_bytes = 1 if self.parameters.multifd else PAGE_SIZE
        self._reader = StreamReader(ChannelSource(self.channel, self.head, self.silence_seconds, least_bytes))
        self._decoder: RamDecoder | None = None
        self._rolling = RollingDigest(self.guest.ram_blocks, zero=True, patient=True)
        self._ram_ended = False
        count = self.parameters.multifd_channels if self.parameters.multifd else 0
        self._multifd = MultifdReceiver(count, self.guest.uuid, self.channel, self.cancellation.check)
        self._multifd_pages = 0
        self._return_path = False
        self._greeted = False
        self._pass_began = time.monotonic()
        self._offer: Offer | None = None
        self._id = b""
        self._own_id = uuid.uuid4().bytes  # of an attempt that its source gives no name
        self._process = OwnProcess()
        self.watch: ProcessWatch | None = None
        self._devices: list[DeviceState] = []
        self._leftovers = Leftovers(self.guest, self.parameters.ignored_sections)
        self._disagreement: StreamError | None = None
        self._their_digest: RamDigest | None = None
        self._their_devices_digest = 0
        self._our_digest: Future[RamDigest] | None = None
        # SHUT(0) is with the kernel.
        self._told = False
        # Once set nothing that fails is a failure of the migration.
        self._started = False

    @property
    def _is_here(self) -> bool:
        """The RAM is the guest's from now on, whatever fails: its source has given it up, or may have."""
        return self.guest.ownership.standing is not Standing.ABSENT

    def run(self) -> None:
        """Take in the guest and start it; the outcome is in the progress."""
        try:
            if self.lobby is not None:
                self.lobby.open(self._multifd.admit)
            self._take_in()
        except Exception as error:
            if self._started:
                log.exception("after the guest was started")
            elif self._is_here:
                self._keep(error)
            else:
                # Why a channel failed is also why the main channel then ended.
                self._give_up(self._disagreement or self._multifd.error or error)
        finally:
            shut = () if self.lobby is None else (self.lobby.shut,)
            for end in (
                *shut,
                self._rolling.stop,
                self._multifd.close,
                self._leftovers.close,
                self._process.close,
            ):
                try:
                    end()
                except Exception:
                    log.exception("at the end of an attempt")

    # -- outcomes --------------------------------------------------------------------------------------------

    def _give_up(self, error: Exception) -> None:
        assert not self._is_here
        text = describe(error)
        if self.record.was_cancelled(self._id):
            text = "the source cancelled the migration"
        elif self.cancellation.is_set:
            text = "it is ending"
        elif isinstance(error, StreamCut):
            text += "; the source gave it up or ended, or the connection broke"
        abandoned = bool(self._id) and self.record.give_up(self._id) is Outcome.ABANDONED
        self._tell(error, text, abandoned=self._id.hex() if abandoned else "")
        self._multifd.close()
        self._rolling.stop()
        for block in self.guest.ram_blocks:
            block.discard()
        if self.lobby is not None:
            # Who hears of the failure may begin again at once: its channels are the next attempt's.
            self.lobby.shut()
        if self.cancellation.is_set:
            self.progress.enter(MigrationStatus.CANCELLED)
        else:
            self.progress.enter(MigrationStatus.FAILED, error=text)

    def _keep(self, error: Exception) -> None:
        """The guest is here, and nobody but its user can start it."""
        in_doubt = not self.guest.ownership.may_run
        if in_doubt:
            text = (
                f"{describe(error)}, after the source, a QEMU, was told that the guest runs here: it stays paused. Look there: "
                "if the guest does not run there and never will (its state is postmigrate), 'cont -f' (QMP: cont with "
                "x-sterna-force) runs it here; else end this one with 'quit'"
            )
        else:
            text = f"the guest is here, and cannot be started: {describe(error)}; 'cont' tries again"
        self.confirmed = True
        self.guest.leave_in_doubt()
        self.progress.enter(MigrationStatus.FAILED, error=text, in_doubt=in_doubt)

    def _tell(self, error: Exception, text: str, *, abandoned: str) -> None:
        """Tell the source why, if it can be told. One that cannot must not get rid of the rest of its stream: that it cannot
        write is all that it will know.
        """
        if not (self._greeted or self._return_path):
            return
        try:
            with self._last_words():
                if self._greeted:
                    nack = error.nack if isinstance(error, _Mismatch) else Nack(text)
                    self._answer(PrivateMessage.NACK, msgspec.structs.replace(nack, abandoned=abandoned))
                else:
                    self.channel.send(shut(1).encode())
                self.channel.end_writing()
                # A source that is busy on another channel comes to read why.
                self._multifd.close()
                self.channel.drain()
        except (ChannelError, Cancelled, MemoryError, OSError):
            pass  # the connection is what failed, or there is no memory or descriptor for talking either

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """What the source has to know is said even when this program is ending, which waits for it for a moment."""
        with Cancellation() as never:
            self.channel.watch(never)
            self.channel.patience_seconds = _LAST_WORDS_SECONDS
            try:
                yield
            finally:
                self.channel.watch(self.cancellation)

    def _answer(self, kind: PrivateMessage, payload: Hello | Ready | Nack | Running) -> None:
        self.channel.send(ReturnMessage(kind, handshake.encode(payload)).encode())

    # -- the stream ------------------------------------------------------------------------------------------

    def _take_in(self) -> None:
        if self.parameters.multifd and self.lobby is None:
            raise Refused(
                f"multifd is on here, and needs several connections: {self.channel.peer} is one; use tcp: or unix:"
            )
        with ThreadPoolExecutor(1, thread_name_prefix="digest") as pool:
            self._read(pool)
            digest = self._compare(pool)
            self.guest.load_devices(self._devices, self.parameters.ignored_sections)
        if self._offer is None:
            self._start_at_end()
        else:
            self._start_on_commit(digest)

    def _read(self, pool: ThreadPoolExecutor) -> None:
        """Read to the end of the stream: RAM into place, devices aside."""
        reader = self._reader
        while True:
            match reader.next():
                case Configuration() as configuration:
                    self._configure(configuration)
                case SectionPiece() as piece:
                    self._require_agreement()
                    self._read_section(piece)
                    if self._ram_ended and self._our_digest is None and self._offer and self._offer.verify:
                        # All of RAM is here: the digest is made while the devices arrive.
                        self._our_digest = self._start_digest(pool)
                case CommandPiece() as command:
                    self._obey(command)
                case EndOfStream():
                    break
                case event:
                    raise reader.error(f"unexpected {type(event).__name__} before the end of the stream")
        if not self._ram_ended:
            raise reader.error("the stream ends without the last part of the ram section")
        if self._greeted and self._offer is None:
            raise reader.error("the source never named the migration")
        self._check_complete()
        left_behind = self._leftovers.settle(self._read_description())
        self.progress.note(left_behind=left_behind)

    def _configure(self, configuration: Configuration) -> None:
        # The source is told why once it can be: a sterna greets next, a QEMU opens the return path.
        self._disagreement = disagreement(configuration, self.guest)
        self._page_bits = page_bits(configuration)
        if self._disagreement is None:
            # Not before: what connects is no guest yet, and people are told of this status.
            self.progress.enter(MigrationStatus.ACTIVE)
            self._decoder = RamDecoder(
                self.guest.ram_blocks, self._page_bits, fresh=True, adopt=self._leftovers.adopt
            )
            for block in self.guest.ram_blocks:
                self._decoder.written[block.name] = self._rolling.marks(block.name)

    def _require_agreement(self) -> None:
        if self._disagreement is not None:
            raise self._disagreement

    def _read_section(self, piece: SectionPiece) -> None:
        reader, header = self._reader, piece.header
        assert self._decoder is not None
        if header.name in (RAM_SECTION, verify.SECTION.name) and header.instance_id:
            raise reader.error("there is only instance 0 of this section")
        if header.name == RAM_SECTION:
            if header.version != RAM_VERSION:
                raise reader.error(
                    f"version {header.version} of the section; only {RAM_VERSION} is supported"
                )
            match piece.type:
                case SectionType.START:
                    self._decoder.read_setup(reader)
                    blocks = (*self.guest.ram_blocks, *self._leftovers.ram_blocks)
                    self._multifd.begin(blocks, self._page_bits, self._decoder.written)
                    self._meet_channels(last=False)
                case SectionType.PART | SectionType.END:
                    before = self._decoder.statistics()
                    self._decoder.read_records(reader)
                    multifd_bytes = self._meet_channels(last=piece.type is SectionType.END)
                    now = self._decoder.statistics()
                    normal = now.normal + self._multifd_pages
                    self.progress.received(now.bytes - before.bytes + multifd_bytes, normal, now.duplicate)
                    self._ram_ended = piece.type is SectionType.END
                    self._leftovers.check_block(self._decoder.block)
                case _:
                    raise reader.error("the section must come in parts")
        elif piece.type is not SectionType.FULL:
            raise reader.error("only the ram section may come in parts")
        elif header.name == verify.SECTION.name:
            if self._greeted and not (self._offer and self._offer.verify):
                raise reader.error("digests of guest RAM, which the source did not offer")
            state = reader.read_state(verify.section_for(self.guest.ram_blocks))
            self._their_digest, self._their_devices_digest = verify.from_state(state)
        elif header.name in self.guest.descriptions:
            self._devices.append(reader.read_state(self.guest.descriptions[header.name]))
        elif self._greeted:
            raise reader.error("this machine has no such device")
        else:
            self._leftovers.take_section(reader, header)

    def _meet_channels(self, *, last: bool) -> int:
        """What follows an EOS waits for what the multifd channels have before it.

        :return: bytes that came on them since the EOS before
        """
        assert self._decoder is not None
        came = self._multifd.meet(self.silence_seconds, self._decoder.received, last=last)
        self._multifd_pages += came.pages
        return came.size

    def _obey(self, command: CommandPiece) -> None:
        match command.kind:
            case Command.OPEN_RETURN_PATH:
                self._return_path = self.channel.two_way
            case Command.PING:
                value = int.from_bytes(command.payload, "big")
                if not self._return_path:
                    return
                if value == handshake.GREETING and not self._greeted:
                    self._greeted = True
                    self._require_agreement()
                    self.progress.note(peer="sterna")
                    self._answer(PrivateMessage.HELLO, self._hello())
                elif self._offer is not None and self._offer.verify:
                    self._catch_up()
                self.channel.send(pong(value).encode())
            case PrivateCommand.OFFER if self._greeted and self._offer is None:
                self._accept(handshake.decode(command.payload, Offer))
            case _:
                raise self._reader.error(f"command {command.kind:#x} is not supported here")

    def _catch_up(self) -> None:
        """A pass has ended, and the source waits for the answer to its ping."""
        self._rolling.catch_up_after(time.monotonic() - self._pass_began)
        self._pass_began = time.monotonic()

    def _hello(self) -> Hello:
        able = self.parameters.verify is not Verify.OFF
        features = [*handshake.FEATURES, *((handshake.FEATURE_DIGEST,) if able else ())]
        features += [handshake.FEATURE_MULTIFD_XBZRLE, handshake.FEATURE_CANCEL]
        host = dict(self.guest.host_traits())
        process = self._process.identity
        return Hello(handshake.VERSION, features, self.incoming_id.hex, time.time_ns(), host, process)

    def _accept(self, offer: Offer) -> None:
        try:
            migration_id = uuid.UUID(hex=offer.migration_id)
        except ValueError:
            raise self._reader.error(f"{offer.migration_id!r:.60} is not the id of a migration") from None
        if not offer.verify and self.parameters.verify is Verify.ON:
            raise Refused("x-sterna-verify is on here, but off at the source")
        self._check_channels(offer.multifd)
        try:
            self._multifd.recognise(bytes.fromhex(offer.token))
        except ValueError:
            raise self._reader.error(f"{offer.token!r:.60} is not the token of multifd channels") from None
        if not self.record.begin(migration_id.bytes):
            raise Refused(f"migration {migration_id} was tried here before; an id is good for one attempt")
        self._id = migration_id.bytes
        self._offer = offer
        self.watch = process.watch(offer.process)
        self.progress.note(migration_id=str(migration_id))
        if offer.verify:
            self._rolling.start()

    def _check_channels(self, theirs: int) -> None:
        ours = self._multifd.count
        if theirs and not ours:
            raise Refused("multifd is on at the source, but off here")
        if ours and not theirs:
            raise Refused("multifd is on here, but off at the source")
        if theirs != ours:
            raise Refused(f"multifd-channels is {theirs} at the source, {ours} here")

    # -- the end ---------------------------------------------------------------------------------------------

    def _check_complete(self) -> None:
        assert self._decoder is not None
        for block in (*self.guest.ram_blocks, *self._leftovers.ram_blocks):
            pages = block.size >> self._page_bits
            missing = full_bitmap(pages) & ~self._decoder.received[block.name]
            if missing.any():
                word = int((missing != 0).argmax())
                bits = int(missing[word])
                page = word * 64 + (bits & -bits).bit_length() - 1
                raise self._reader.error(
                    f"RAM block {block.name!r}: page at {page << self._page_bits:#x} never came"
                )

    def _read_description(self) -> bytes | None:
        """Read what follows the end, so that the source can finish writing it."""
        reader = self._reader
        # A source that could not send it whole may go on: a file is whole where it ends, a connection is not.
        event = reader.next()
        if event is None and self.channel.two_way:
            raise reader.error(
                "the stream is cut short before its description (a QEMU sends it unless its machine has suppress-vmdesc=on)"
            )
        return event.text if isinstance(event, VmDescription) else None

    def _start_digest(self, pool: ThreadPoolExecutor) -> "Future[RamDigest]":
        return pool.submit(self._rolling.finish, check=self.cancellation.check)

    def _compare(self, pool: ThreadPoolExecutor) -> RamDigest | None:
        """Compare digests, if the source sent any.

        :raise VerificationError: When RAM differs.
        """
        theirs = self._their_digest
        if theirs is None:
            if self._offer is not None and self._offer.verify:
                raise self._reader.error("the source agreed to send digests of guest RAM, and did not")
            return None
        descriptions = self.guest.descriptions
        devices = verify.devices_digest(
            (state, descriptions[state.name].encode(state)) for state in self._devices
        )
        if devices != self._their_devices_digest:
            raise VerificationError("the device sections are not what the source sent: their digest differs")
        ours = (self._our_digest or self._start_digest(pool)).result()
        self.progress.note(ram_digest_source=theirs.hex, ram_digest_destination=ours.hex)
        different = verify.compare(theirs, ours)
        self.progress.note(verified=different is None)
        if different is None:
            return ours
        pages = b""
        if different.chunk >= 0:
            block = next(b for b in self.guest.ram_blocks if b.name == different.block)
            pages = page_digests(block, different.chunk).astype(">u8").tobytes()
        reason = f"guest RAM differs from the source's: {different}"
        raise _Mismatch(Nack(reason, different.block, different.chunk, pages, ours.hex))

    # -- the start -------------------------------------------------------------------------------------------

    def _start_at_end(self) -> None:
        """Start a guest whose source waits for nothing but the return path's end."""
        self.channel.finish()
        if not (self.record.begin(self._own_id) and self.record.commit(self._own_id)):
            raise Refused("it is ending")
        if self._return_path:
            self._shut()
            self.channel.await_arrival(_ARRIVAL_SECONDS)
        self.record.running(self._own_id, self._start())
        self.confirmed = True
        self.progress.enter(MigrationStatus.COMPLETED)

    def _shut(self) -> None:
        """Have a QEMU give its guest up. On any other end of its return path it goes on with it.

        :raise ChannelError, Cancelled: When it has not been told, and never will be.
        """
        peer, ownership = self.channel.peer, self.guest.ownership
        try:
            if self.channel.hung_up():
                raise ChannelError(
                    f"{peer} closed the connection before it was told that the guest runs here"
                )
            ownership.apply(Event.SHUT_SENT, self._own_id)
            self.channel.send(shut(0).encode())
        except BaseException:
            ownership.apply(Event.SHUT_CUT, self._own_id)  # part of it says nothing
            self.record.start_failed(self._own_id)
            raise
        self._told = True

    def _start(self, elapsed_ns: int | None = None, *, watched: bool = False) -> int:
        """Take the guest over, and start it.

        :param elapsed_ns: how long it was down, where the source tells
        :param watched: the source takes the end of this process for the guest's
        :return: CLOCK_REALTIME in ns just before its first instruction
        """
        try:
            self.guest.ownership.apply(Event.TAKEN_OVER, self._id or self._own_id, watched=watched)
            if elapsed_ns is not None:
                self.guest.advance_counter(elapsed_ns)
            self.guest.announce(self.parameters.announce_delays)
            clock_ns = self.guest.resume()
        except BaseException:
            # `resume` starts all of it or nothing.
            if not self._told:
                self.guest.ownership.apply(Event.GIVEN_BACK, self._id or self._own_id)
                self.record.start_failed(self._id or self._own_id)
            raise
        self._started = True
        return clock_ns

    def _start_on_commit(self, digest: RamDigest | None) -> None:
        self._answer(PrivateMessage.READY, Ready(digest.hex if digest else "", self.watch is not None))
        commit = handshake.decode(self._private_command(PrivateCommand.COMMIT), Commit)
        self.cancellation.check()
        longest_ns = time.monotonic_ns() - self._accepted
        elapsed_ns = time.time_ns() - (commit.stop_ns + commit.clock_offset_ns)
        elapsed_ns, note = handshake.clamp_elapsed(elapsed_ns, longest_ns)
        if not self.record.commit(self._id):
            raise Refused("the migration was given up before its COMMIT arrived")
        clock_ns = self._start(elapsed_ns, watched=commit.watched)
        self.record.running(self._id, clock_ns)
        self.progress.enter(MigrationStatus.COMPLETED, clock_note=note)
        self._say(lambda: self._answer(PrivateMessage.RUNNING, Running(clock_ns, note)))
        self._quietly(self._wait_confirm)

    def _say(self, action: Callable[[], object]) -> None:
        """Tell the source that the guest runs."""
        with self._last_words():
            self._quietly(action)

    def _wait_confirm(self) -> None:
        self._private_command(PrivateCommand.CONFIRM)
        self.guest.ownership.apply(Event.CONFIRMED, self._id)
        self.confirmed = True

    def _private_command(self, kind: PrivateCommand) -> bytes:
        """Wait for a command after the end of the stream."""
        reader = self._reader
        at = reader.offset
        if reader.take(1)[0] != SectionType.COMMAND or int.from_bytes(reader.take(2), "big") != kind:
            raise reader.error(f"{kind.name} belongs here", at)
        return reader.take(int.from_bytes(reader.take(2), "big"))

    def _quietly(self, action: Callable[[], object]) -> None:
        try:
            action()
        except (ChannelError, Cancelled, StreamError):
            pass  # the source asks again if it must know
