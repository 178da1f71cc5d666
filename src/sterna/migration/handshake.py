"""How two sternas recognise each other and hand over a guest, so that exactly one of them runs it.

Between two sternas the stream carries more than QEMU's: private commands (source to destination) and private
messages on the return path. A peer that does not answer the greeting with `Hello` never sees any of them.

::

    source                                                    destination
      header, configuration
      OPEN_RETURN_PATH, PING(GREETING)     ------------->
                                           <-------------     HELLO (a sterna only), PONG(GREETING)
                                                        (features, clock, its process, what the host has for a guest)
      OFFER: id of this migration, verify, process -------->  the id is pending from here
      RAM, pass by pass; then the guest stops here
      last pages, devices [, digests], EOF, description
                                           ------------->     digests compared, devices decoded and loaded
                                           <-------------     READY, or NACK with the reason
      COMMIT: when the guest stopped       ------------->     the id is committed: the guest starts
                                           <-------------     RUNNING: clock before the first instruction
      CONFIRM                              ------------->     nobody will ask any more

`sterna.ownership` draws the states of both ends and has their transition functions; both ends call these.

- Before COMMIT was handed to the kernel whole, the source owns the guest: on any failure or cancel it
resumes, and the destination never starts, because it starts on COMMIT only.
- COMMIT is the point of no return for cancelling. If RUNNING does not arrive, the source asks on a fresh
connection to the same URI (`sterna.migration.outcome_query`). The destination decides each id once, under one lock:
an id that is still pending when the question comes is abandoned, and a COMMIT that arrives later is refused.
- A connection that is refused or lost, silence, and a sterna that does not know the id tell nothing. Besides the destination's
word only the end of its process resolves the doubt: where both run on one host, each holds a descriptor of the other's process
(`sterna.migration.process`). The source says in COMMIT that it watches, and READY says that the destination does; a destination
that is watched does not migrate the guest on before CONFIRM, or before the source has ended.
- Else the source stays paused. It says who may run, and `x-sterna-resolve-doubt` asks again, or hears what has been said since on
the connection that cannot be asked twice (`sterna.migration.witness`).
- A destination that falls silent before COMMIT does not keep the guest stopped: after `x-sterna-switchover-timeout` the
source gives the attempt up, which is its own to give up; after COMMIT it asks.
- A source that falls silent, or only drips, does not keep others out of a destination that listens: once it has been waited
for a minute for less than a page its attempt fails, and its id is abandoned.
- A destination that is told to end abandons what is pending before anything else, and says so: a COMMIT that arrives while the
rest of it ends counts for nothing.
- A destination that takes in, or runs, another guest answers the greeting with NACK instead of HELLO.

With QEMU as destination there is no COMMIT: QEMU starts the guest by itself when it has read the end of the stream. So the end
is sent when QEMU has answered a ping behind the devices: it has loaded everything then, and what fails before that fails while
the source owns the guest. After the end only SHUT(0) tells that QEMU has the guest. The other value tells nothing: QEMU 7.2 sends
it also when the guest runs and the stream broke behind its end. It cannot be asked; its connection is kept until it has spoken.
With QEMU as source the destination sends SHUT(0), which has QEMU give the guest up, and starts it when that is acknowledged.
A command (`exec:`) may have the guest as soon as a byte of the end is in its pipe, and is not ended any more. It has it when it
has exited with 0; another exit status tells nothing, nor does who reads a descriptor (`fd:`). A file has it when it is complete.
"""

from enum import IntEnum
from typing import Annotated, TypeVar

import msgspec
import xxhash

from sterna.host.printable import one_line
from sterna.migration.errors import ProtocolError
from sterna.migration.process import ProcessIdentity
from sterna.stream.multifd.format import CHANNEL_LIMIT

GREETING = 0x53544E41
"""Value of the PING that a sterna answers with `Hello` before the PONG ("STNA")."""
VERSION = 1
FEATURES = ("commit", "counter")
"""What every sterna of this version does. ``digest`` is added unless verification is off."""
FEATURE_DIGEST = "digest"
FEATURE_CANCEL = "cancel"
"""It listens to a source that says on a fresh connection that it cancels."""
FEATURE_MULTIFD_XBZRLE = "multifd-xbzrle"
"""It takes what changed in pages (XBZRLE) on the main channel beside whole pages on multifd channels. Every sterna does."""


class PrivateCommand(IntEnum):
    """Types of our COMMAND parts, far from QEMU's."""

    OFFER = 0x5301
    COMMIT = 0x5302
    CONFIRM = 0x5303


class PrivateMessage(IntEnum):
    """Types of our return path messages, far from QEMU's."""

    HELLO = 0xD301
    READY = 0xD302
    NACK = 0xD303
    RUNNING = 0xD304


ClockNs = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
"""A peer's CLOCK_REALTIME in ns, up to the year 2116; sums and differences of two are good for the guest's clock too."""
OffsetNs = Annotated[int, msgspec.Meta(gt=-(1 << 62), lt=1 << 62)]
_TRAIT_LIMIT = 1 << 64
"""What a host has is 64 bits without sign (`sterna.hypervisor.traits.Trait`)."""


class Hello(msgspec.Struct, frozen=True):
    """The destination introduces itself.

    :ivar features: what it can do
    :ivar incoming_id: UUID of its present wait for a guest
    :ivar clock_ns: its CLOCK_REALTIME when it read the greeting
    :ivar host: what it has for a guest, by the names of `sterna.hypervisor.traits`
    :ivar process: its process; a sterna 0.1 states none
    """

    version: Annotated[int, msgspec.Meta(ge=0, lt=1 << 31)]
    features: list[str]
    incoming_id: str
    clock_ns: ClockNs
    host: dict[str, Annotated[int, msgspec.Meta(ge=0)]] = {}
    process: ProcessIdentity | None = None

    def __post_init__(self) -> None:
        # msgspec has no bound beyond 63 bits.
        if any(value >= _TRAIT_LIMIT for value in self.host.values()):
            raise ValueError("what a host has is a number of 64 bits")


class Offer(msgspec.Struct, frozen=True):
    """The source names the migration.

    :ivar migration_id: 32 hexadecimal digits, new for each attempt
    :ivar verify: a digest section comes before the end of the stream
    :ivar multifd: number of multifd channels, 0 without
    :ivar token: what the initial packet of each of them has, 32 hexadecimal digits; a sterna 0.1 gives none
    :ivar process: its process, if it can watch the destination's
    """

    migration_id: str
    verify: bool
    multifd: Annotated[int, msgspec.Meta(ge=0, le=CHANNEL_LIMIT)] = 0
    token: str = ""
    process: ProcessIdentity | None = None


class Ready(msgspec.Struct, frozen=True):
    """The destination has everything and waits for COMMIT.

    :ivar digest: root digest of its RAM, 16 hexadecimal digits, or empty
    :ivar watches: it watches the source's process
    """

    digest: str = ""
    watches: bool = False


class Nack(msgspec.Struct, frozen=True):
    """The destination refuses.

    :ivar reason: one line
    :ivar block: for a digest that differs: name of the RAM block
    :ivar chunk: number of the chunk
    :ivar pages: digests of the chunk's pages at the destination, big-endian uint64
    :ivar digest: root digest of its RAM
    :ivar abandoned: id of the migration, 32 hexadecimal digits, when it is recorded that this guest is never started here; what
        refuses without a record tells a source that has sent COMMIT nothing
    """

    reason: str
    block: str = ""
    chunk: Annotated[int, msgspec.Meta(ge=-1, lt=1 << 42)] = -1
    pages: bytes = b""
    digest: str = ""
    abandoned: str = ""


class Commit(msgspec.Struct, frozen=True):
    """The guest is the destination's.

    :ivar stop_ns: CLOCK_REALTIME of the source when the last vCPU had left guest mode
    :ivar clock_offset_ns: the destination's clock minus the source's, as the source measured it
    :ivar watched: the source takes the end of the destination's process for the end of the guest, until it sends CONFIRM
    """

    stop_ns: ClockNs
    clock_offset_ns: OffsetNs
    watched: bool = False


class Running(msgspec.Struct, frozen=True):
    """The destination runs the guest.

    :ivar clock_ns: its CLOCK_REALTIME just before the first guest instruction
    :ivar clock_note: set when the clocks gave an impossible downtime, which was clamped
    """

    clock_ns: ClockNs
    clock_note: str = ""


Payload = TypeVar("Payload", Hello, Offer, Ready, Nack, Commit, Running)


_CHECK_BYTES = 4


def encode(payload: msgspec.Struct) -> bytes:
    """A payload: JSON, and a checksum (XXH32, be32), because a damaged COMMIT must not count."""
    data = msgspec.json.encode(payload)
    return data + xxhash.xxh32_digest(data)


def decode(data: bytes, kind: type[Payload]) -> Payload:
    """A payload, its texts each cut to one line: people are shown them.

    :raise ProtocolError: When it is not the JSON of a `kind`, has a number out of its range, or is damaged.
    """
    data, check = data[:-_CHECK_BYTES], data[-_CHECK_BYTES:]
    if xxhash.xxh32_digest(data) != check:
        raise ProtocolError(f"damaged {kind.__name__} message from the peer: its checksum is wrong")
    try:
        payload = msgspec.json.decode(data, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"malformed {kind.__name__} message from the peer: {error}") from error
    texts = {
        name: one_line(value)
        for name, value in msgspec.structs.asdict(payload).items()
        if isinstance(value, str)
    }
    return msgspec.structs.replace(payload, **texts)


def clock_offset(sent_ns: int, received_ns: int, peer_ns: int) -> int:
    """How far the peer's clock is ahead, from one question and answer; 0 when that is within the measuring
    error.

    The answer was made somewhere between the two times, so the error is at most half the round trip.
    """
    offset = peer_ns - (sent_ns + received_ns) // 2
    return 0 if abs(offset) <= received_ns - sent_ns else offset


def clamp_elapsed(elapsed_ns: int, longest_ns: int) -> tuple[int, str]:
    """An elapsed time that clocks can have falsified, kept between 0 and what is possible.

    :return: the time to use, and a note that is empty when nothing was changed
    """
    if elapsed_ns < 0:
        return 0, f"clocks disagree: the guest was down for {elapsed_ns / 1e6:.3f} ms; took 0"
    if elapsed_ns > longest_ns:
        return longest_ns, (
            f"clocks disagree: the guest was down for {elapsed_ns / 1e6:.3f} ms, "
            f"but the migration took {longest_ns / 1e6:.3f} ms; took that"
        )
    return elapsed_ns, ""
