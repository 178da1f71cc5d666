"""The guest programs that ship with the package: what they do, what arguments they take, where their images are."""

import re
from dataclasses import dataclass
from pathlib import Path

from sterna.guests.errors import GuestError as GuestError
from sterna.guests.layout import MAX_CPUS, PAGE_BYTES, WORK_OFFSET

BOARDS = ("virt", "vexpress-a15", "virt-arm64", "pc-min")
"""Boards that images are built for."""

LINUX = "linux-arm"
"""In the place of a board: the program is a process of ARM Linux."""

LINUX_PROGRAMS = ("dirtyram", "clock", "random")
"""Those that are built as such."""

IMAGES = Path(__file__).parent / "images"

_NUMBER = re.compile(r"0[xX][0-9a-fA-F]{1,16}|[0-9]{1,19}", re.ASCII)
_ADDRESS = re.compile(r"[0-9]{1,3}(\.[0-9]{1,3}){3}", re.ASCII)
_MAX_MS = 3_600_000
_MAX_PAGES_PER_MS = 4096
_DEFAULT_RAM_BYTES = 128 << 20
_RAM_LIMIT = {
    "virt": 0xC000_0000,
    "vexpress-a15": 0x8000_0000,
    "virt-arm64": 0xC000_0000,
    "pc-min": 0xB000_0000,
}
"""RAM that the guests use: they know addresses up to 4 GiB."""


_EXAMPLE_ADDRESS = "10.83.9.1"


@dataclass(frozen=True)
class Argument:
    """One number a program takes. `maximum` None: bounded by RAM (checked by `validate`) or not at all.

    :ivar address: it is an IPv4 address, written as such
    """

    name: str
    default: int
    help: str
    minimum: int = 0
    maximum: int | None = None
    address: bool = False


@dataclass(frozen=True)
class Program:
    """A guest program.

    :ivar least: how many arguments must be given, unless none are
    :ivar hidden: how many of the last arguments are for tests and left out of the usage
    :ivar needs_nic: it cannot do without a network card
    """

    name: str
    description: str
    arguments: tuple[Argument, ...]
    least: int
    hidden: int = 0
    needs_nic: bool = False

    @property
    def usage(self) -> str:
        """For example ``dirtyram PAGES PAGES_PER_STEP SLEEP_MS``."""
        shown = self.arguments[: len(self.arguments) - self.hidden]
        required = [argument.name for argument in shown[: self.least]]
        optional = [argument.name for argument in shown[self.least :]]
        tail = "".join(f" [{name}" for name in optional) + "]" * len(optional)
        return " ".join([self.name, *required]) + tail


PROGRAMS: dict[str, Program] = {
    program.name: program
    for program in (
        Program(
            "dirtyram",
            "touches every page once, then writes a counter into the next pages, step by step, for ever",
            (
                Argument("PAGES", 4096, "4 KiB pages to write in all, shared by the CPUs", minimum=1),
                Argument("PAGES_PER_STEP", 64, "pages written per step, shared by the CPUs", minimum=1),
                Argument("SLEEP_MS", 10, "sleep between steps in milliseconds", maximum=_MAX_MS),
                Argument(
                    "WORDS",
                    0,
                    "random words of 8 bytes per write; steps then begin SLEEP_MS apart",
                    maximum=511,
                ),
            ),
            least=3,
        ),
        Program(
            "clock",
            "prints the time that the counter tells, and records the gaps between two readings of it",
            (Argument("PERIOD_MS", 1000, "milliseconds between lines", minimum=1, maximum=_MAX_MS),),
            least=0,
        ),
        Program(
            "random",
            "writes pseudo-random words to pseudo-random pages, and finds out by itself when a page was lost",
            (
                Argument("SEED", 1, "start of the pseudo-random sequence", maximum=(1 << 64) - 1),
                Argument("PAGES", 4096, "4 KiB pages in all, shared by the CPUs", minimum=2),
                Argument("STEPS_PER_MS", 16, "page writes per CPU and millisecond", minimum=1, maximum=4096),
                Argument("LOSE", 0, "for tests: number of the page write that is left out"),
            ),
            least=0,
            hidden=1,
        ),
        Program(
            "net",
            "answers ARP, ICMP echo and UDP echo, counts what it answered, and writes pages meanwhile",
            (
                Argument("ADDRESS", 0, "its IPv4 address", minimum=1, address=True),
                Argument("PAGES", 0, "4 KiB pages to write in all, shared by the CPUs"),
                Argument(
                    "PAGES_PER_MS", 1, "pages written per millisecond", minimum=1, maximum=_MAX_PAGES_PER_MS
                ),
            ),
            least=1,
            needs_nic=True,
        ),
    )
}
"""The programs by name."""


def find(name: str, board: str) -> Path:
    """The image of program `name` for `board`.

    :raise GuestError: When there is no such program or board, or the package lacks the image.
    """
    _program(name)
    if board not in BOARDS and (board != LINUX or name not in LINUX_PROGRAMS):
        raise GuestError(f"no guest programs for board {board!r}; there are some for: {', '.join(BOARDS)}")
    image = IMAGES / f"{name}-{board}.elf"
    if not image.is_file():
        raise GuestError(f"{image} is missing; python -m sterna.guests.build makes it")
    return image


def validate(
    name: str, append: str, *, cpus: int = 1, memory_bytes: int = _DEFAULT_RAM_BYTES, board: str = "virt"
) -> tuple[int, ...]:
    """The arguments that program `name` will run with when its command line is `append`, defaults filled in.

    The guest makes the same checks, but can only complain on its UART.

    :param cpus: number of vCPUs
    :param memory_bytes: size of RAM
    :raise GuestError: When there is no such program, or it cannot run with these arguments on such a machine.
    """
    program = _program(name)
    texts = [text for text in append.replace("\t", " ").split(" ") if text]
    most = len(program.arguments)
    if any(argument.address for argument in program.arguments[len(texts) :]):
        raise GuestError(
            f"{name}: it needs its IPv4 address, such as --append {_EXAMPLE_ADDRESS}; usage: {program.usage}"
        )
    if len(texts) > most or 0 < len(texts) < program.least:
        raise GuestError(f"{name}: {len(texts)} arguments given ({append!r}); usage: {program.usage}")
    values = [argument.default for argument in program.arguments]
    for index, (argument, text) in enumerate(zip(program.arguments, texts, strict=False)):
        values[index] = _address(name, argument, text) if argument.address else _number(name, argument, text)
    for argument, value in zip(program.arguments, values, strict=True):
        if value < argument.minimum or (argument.maximum is not None and value > argument.maximum):
            bounds = f"at least {argument.minimum}"
            if argument.maximum is not None:
                bounds += f" and at most {argument.maximum}"
            raise GuestError(f"{name}: {argument.name} is {value}; it must be {bounds}")
    _check_machine(name, values, min(cpus, MAX_CPUS), min(memory_bytes, _RAM_LIMIT.get(board, memory_bytes)))
    return tuple(values)


def _number(program: str, argument: Argument, text: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise GuestError(f"{program}: {argument.name} is {text!r}, not a decimal or 0x number of 64 bits")
    return int(text, 0 if text[:2] in ("0x", "0X") else 10)


def _address(program: str, argument: Argument, text: str) -> int:
    parts = [int(part) for part in text.split(".")] if _ADDRESS.fullmatch(text) else []
    if not parts or max(parts) > 255:
        raise GuestError(
            f"{program}: {argument.name} is {text!r}, not an IPv4 address such as {_EXAMPLE_ADDRESS}"
        )
    return int.from_bytes(bytes(parts), "big")


def _check_machine(name: str, values: list[int], cpus: int, memory_bytes: int) -> None:
    work_pages = (memory_bytes - WORK_OFFSET) // PAGE_BYTES
    if work_pages < 1:
        raise GuestError(
            f"{name}: {memory_bytes} bytes of memory are too few; it needs 4 MiB and a page at least"
        )
    if name == "clock" or (name == "net" and not values[1]):
        return
    pages = values[0] if name == "dirtyram" else values[1]
    if pages > work_pages:
        raise GuestError(
            f"{name}: PAGES is {pages}, but {memory_bytes >> 20} MiB of memory have room for {work_pages}; "
            f"the first {WORK_OFFSET >> 20} MiB are the program's own"
        )
    least = 2 * cpus if name == "random" else cpus
    if pages < least:
        raise GuestError(f"{name}: PAGES is {pages}; with {cpus} CPUs it must be at least {least}")
    if name == "dirtyram" and values[1] > pages:
        raise GuestError(f"{name}: PAGES_PER_STEP is {values[1]}, more than PAGES, which is {pages}")


def _program(name: str) -> Program:
    if name not in PROGRAMS:
        raise GuestError(f"no guest program {name!r}; there are: {', '.join(PROGRAMS)}")
    return PROGRAMS[name]
