"""The status page: what a guest program tells the host, mirrored from ``src/status.h``.

The page lies `STATUS_OFFSET` above the start of RAM and fills 4096 bytes, little-endian. The host only reads it. The global
part is written by CPU 0 before the other CPUs start and by whichever CPU fails; each CPU writes its own record.

The host may look between any two guest instructions, so a count is stored after the work it counts: at most one piece
of work is ahead of its count.

How to tell a gap caused by a migration from others: each reading of the counter that comes more than 5 ms after the one
before puts (`start`, `ticks`) into a ring of eight records and then raises `long_gaps`. Note `long_gaps` and `last_counter`
before the migration; `Status.gaps_since` then gives the gaps that began at or after that time.
"""

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sterna.guests.errors import GuestError

STATUS_OFFSET = 0x200000
"""Bytes from the start of RAM to the status page."""

WORK_OFFSET = 0x400000
"""Bytes from the start of RAM to the first page that programs write; below are device tree, status page, code, stacks."""

STATUS_BYTES = 4096
STATUS_MAGIC = int.from_bytes(b"STNAGUES", "little")
STATUS_VERSION = 1
MAX_CPUS = 4
GAP_RECORDS = 8
PAGE_BYTES = 4096


class ProgramId(IntEnum):
    """Field `program`."""

    DIRTYRAM = 1
    CLOCK = 2
    RANDOM = 3
    NET = 4


class BoardId(IntEnum):
    """Field `board`."""

    VIRT = 1
    VEXPRESS_A15 = 2
    PC_MIN = 3
    VIRT_ARM64 = 4
    LINUX_ARM = 5


class GuestState(IntEnum):
    """Field `state`: STARTING -> RUNNING, and from either to ERROR, which is final."""

    STARTING = 0
    RUNNING = 1
    ERROR = 2


class CpuState(IntEnum):
    """Field `state` of a CPU's record. OFF: it has not come up, or takes no part."""

    OFF = 0
    RUNNING = 1
    STOPPED = 2


class ErrorCode(IntEnum):
    """Field `error`: why a guest is in state ERROR. The guest has said the same in words on its UART."""

    NONE = 0
    ARGUMENT_COUNT = 1
    ARGUMENT_NUMBER = 2
    ARGUMENT_RANGE = 3
    MEMORY = 4
    DEVICE_TREE = 5
    CPU_START = 6
    EXCEPTION = 7
    DEVICE = 8


class DirtyramWord(IntEnum):
    """Words of `dirtyram`: write number w (from 0) puts u32 w + 1 at offset 0 of work page FIRST + w % PAGES, and then random
    words from offset 8 on, as many as its fourth argument says.
    """

    FIRST = 0  # first page of the CPU's share, from work_base
    PAGES = 1  # pages in the share
    PER_STEP = 2  # pages written per step after the initial touch
    WRITES = 3  # writes done, stored after each
    NEXT = 4  # page of the share to be written next, stored once per 64 writes
    PASSES = 5  # times the share was written whole


class ClockWord(IntEnum):
    """Words of `clock`."""

    SEQUENCE = 0  # lines printed
    PERIOD = 1  # ticks between lines


class NetWord(IntEnum):
    """Words of `net`'s CPU 0; the words of `dirtyram` hold for the pages that it writes."""

    ADDRESS = 6  # IPv4, as a number in host order
    RECEIVED = 7  # frames, whatever they were
    ARP = 8  # requests answered; this and the next two are stored before the answer is sent
    ICMP = 9  # echo requests answered
    UDP = 10  # datagrams sent back
    OTHER = 11  # frames that were not for it, or were damaged
    SEQUENCE = 12  # highest number that a datagram had, plus one
    LOST = 13  # numbers that were left out on the way up
    AGAIN = 14  # numbers not higher than the one before: late, or twice
    UNSENT = 15  # answers for which the device had no room


class RandomWord(IntEnum):
    """Words of `random`; the generator is described in ``src/random.c`` and `sterna.guests.check`."""

    FIRST = 0  # first page of the CPU's share, from work_base: its table of tags
    TABLE_PAGES = 1
    PAGES = 2  # data pages, behind the table
    SEED = 3  # of this CPU
    STEPS = 4  # page writes done, stored after each
    CHECKSUM = 5  # of all data pages
    READY = 6  # data pages filled
    SWEEPS = 7  # times the guest read all its pages back
    ERRORS = 8  # found by the guest
    ERROR_KIND = 9  # of the latest error: RandomError
    ERROR_PAGE = 10  # of the latest error; 2^64 - 1 when it cannot be told
    ERROR_STEP = 11  # STEPS when the latest error was found


class RandomError(IntEnum):
    """Word ERROR_KIND of `random`."""

    NONE = 0
    STALE_PAGE = 1
    SUM = 2
    REGISTERS = 3


GAP = np.dtype([("start", "<u8"), ("ticks", "<u8")])
"""A gap between two consecutive readings: the counter before it, and its length in ticks (0: record never used)."""

CPU_RECORD = np.dtype(
    [
        ("state", "<u4"),  # CpuState
        ("mpidr", "<u4"),
        ("steps", "<u8"),  # heartbeat
        ("last_counter", "<u8"),
        ("largest_gap", "<u8"),  # ticks
        ("largest_gap_start", "<u8"),
        ("backward_steps", "<u8"),  # readings below the one before
        ("backward_ticks", "<u8"),  # size of the latest of those
        ("long_gaps", "<u8"),  # gaps above long_gap_ticks; the latest is gaps[(long_gaps - 1) % 8]
        ("fault_vector", "<u4"),
        ("fault_pc", "<u4"),
        ("fault_address", "<u4"),
        ("fault_status", "<u4"),
        ("reserved", "<u8", (6,)),
        ("words", "<u8", (16,)),  # DirtyramWord, ClockWord, NetWord or RandomWord
        ("gaps", GAP, (GAP_RECORDS,)),
        ("reserved2", "<u8", (48,)),
    ]
)
"""What one CPU writes, 768 bytes."""

STATUS = np.dtype(
    [
        ("magic", "<u8"),
        ("version", "<u4"),
        ("program", "<u4"),  # ProgramId
        ("board", "<u4"),  # BoardId
        ("state", "<u4"),  # GuestState
        ("error", "<u4"),  # ErrorCode
        ("cpus", "<u4"),  # that take part
        ("frequency", "<u4"),  # of the counter, Hz
        ("long_gap_ticks", "<u4"),  # 5 ms
        ("ram_base", "<u8"),
        ("ram_bytes", "<u8"),
        ("work_base", "<u8"),
        ("work_pages", "<u8"),
        ("argument_count", "<u4"),  # given; the rest of args are defaults
        ("device_tree_bytes", "<u4"),  # 0: none found
        ("args", "<u8", (8,)),
        ("reserved", "<u8", (14,)),
        ("bootargs", "S256"),
        ("reserved2", "<u8", (64,)),
        ("cpu", CPU_RECORD, (MAX_CPUS,)),
    ]
)
"""The status page, 4096 bytes."""

assert CPU_RECORD.itemsize == 768
assert STATUS.itemsize == STATUS_BYTES


class StatusError(GuestError):
    """The bytes given are not the status page of a guest program that this version knows."""


@dataclass(frozen=True)
class Gap:
    """A time in which a CPU did not read the counter: `start` and `ticks` in counter ticks, `milliseconds` long."""

    start: int
    ticks: int
    milliseconds: float


@dataclass(frozen=True)
class Status:
    """A copy of a status page.

    :ivar record: zero-dimensional structured array of dtype `STATUS`
    """

    record: NDArray[Any]

    @property
    def program(self) -> ProgramId:
        """Which program runs."""
        return ProgramId(int(self.record["program"]))

    @property
    def state(self) -> GuestState:
        """Whether it runs."""
        return GuestState(int(self.record["state"]))

    @property
    def error(self) -> ErrorCode:
        """Why it does not."""
        return ErrorCode(int(self.record["error"]))

    @property
    def cpus(self) -> int:
        """CPUs that take part, 1 to 4."""
        return int(self.record["cpus"])

    @property
    def frequency(self) -> int:
        """Of the counter, in Hz."""
        return int(self.record["frequency"])

    @property
    def args(self) -> tuple[int, ...]:
        """The arguments in effect, defaults included; 8 values."""
        return tuple(int(value) for value in self.record["args"])

    @property
    def bootargs(self) -> str:
        """The arguments as the guest found them in the device tree, cut to 255 bytes."""
        return self.record["bootargs"].tobytes().rstrip(b"\0").decode("ascii", "replace")

    def cpu(self, index: int) -> NDArray[Any]:
        """The record of CPU `index`, dtype `CPU_RECORD`.

        :raise IndexError: When that CPU takes no part.
        """
        if not 0 <= index < self.cpus:
            raise IndexError(f"CPU {index} takes no part: the guest has {self.cpus}")
        record: NDArray[Any] = self.record["cpu"][index]
        return record

    def word(self, cpu: int, word: IntEnum) -> int:
        """One of the program's own words."""
        return int(self.cpu(cpu)["words"][int(word)])

    def steps(self) -> int:
        """Steps of all CPUs together: the heartbeat."""
        return sum(int(self.cpu(index)["steps"]) for index in range(self.cpus))

    def milliseconds(self, ticks: int) -> float:
        """`ticks` of the counter as milliseconds."""
        return 1000 * ticks / self.frequency

    def largest_gap(self) -> Gap:
        """The largest gap that any CPU has seen since it started."""
        worst = max((self.cpu(index) for index in range(self.cpus)), key=lambda cpu: int(cpu["largest_gap"]))
        return self._gap(int(worst["largest_gap_start"]), int(worst["largest_gap"]))

    def gaps_since(self, cpu: int, counter: int = 0) -> list[Gap]:
        """Gaps above 5 ms of one CPU that began at `counter` or later, oldest first; only the latest eight are known."""
        record = self.cpu(cpu)
        count = int(record["long_gaps"])
        gaps = []
        for number in range(max(0, count - GAP_RECORDS), count):
            start, ticks = (int(value) for value in record["gaps"][number % GAP_RECORDS])
            if start >= counter:
                gaps.append(self._gap(start, ticks))
        return gaps

    def backward_steps(self) -> int:
        """Times that any CPU saw the counter go back."""
        return sum(int(self.cpu(index)["backward_steps"]) for index in range(self.cpus))

    def _gap(self, start: int, ticks: int) -> Gap:
        return Gap(start, ticks, self.milliseconds(ticks))


def read_status(page: bytes | bytearray | memoryview | NDArray[np.uint8]) -> Status:
    """The status in `page`, the 4096 bytes at `STATUS_OFFSET` of RAM (more bytes may follow).

    The bytes are copied. They come from a guest, so their values are checked as far as this module relies on them.

    :raise StatusError: When they are too few, or not a started guest program's status page.
    """
    # A copy first: it cannot change under the checks.
    data = bytes(page[:STATUS_BYTES])
    if len(data) < STATUS_BYTES:
        raise StatusError(f"a status page has {STATUS_BYTES} bytes, not {len(data)}")
    record = np.frombuffer(data, dtype=STATUS, count=1).reshape(())
    magic, version = int(record["magic"]), int(record["version"])
    if magic != STATUS_MAGIC:
        raise StatusError(
            f"no guest program's status page: its magic is {magic:#018x}, not {STATUS_MAGIC:#018x}"
        )
    if version != STATUS_VERSION:
        raise StatusError(f"status page of version {version}; this sterna reads version {STATUS_VERSION}")
    if int(record["program"]) not in list(ProgramId):
        raise StatusError(
            f"status page of an unknown program ({int(record['program'])}), or it has not started"
        )
    if int(record["state"]) not in list(GuestState) or int(record["error"]) not in list(ErrorCode):
        raise StatusError(f"status page with state {int(record['state'])} and error {int(record['error'])}")
    if int(record["cpus"]) > MAX_CPUS:
        raise StatusError(f"status page with {int(record['cpus'])} CPUs; at most {MAX_CPUS} can be")
    if int(record["frequency"]) == 0:
        raise StatusError("status page with a counter frequency of 0")
    return Status(record)


def read_status_of_ram(ram: NDArray[np.uint8]) -> Status:
    """The status of the guest whose RAM is `ram`, uint8, `shape (bytes,)`.

    :raise StatusError: When RAM is too small to hold a status page, or holds none.
    """
    if ram.size < STATUS_OFFSET + STATUS_BYTES:
        raise StatusError(f"RAM of {ram.size} bytes ends before the status page at {STATUS_OFFSET:#x}")
    return read_status(ram[STATUS_OFFSET : STATUS_OFFSET + STATUS_BYTES])
