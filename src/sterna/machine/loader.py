"""Loading a guest: an ELF file's segments, with the device tree at the start of RAM."""

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from sterna.machine.board import Board
from sterna.machine.errors import MachineError

_IDENT_BYTES = 16
_MAX_SEGMENTS = 1024


class LoadError(MachineError):
    """A kernel file cannot be loaded; the text names the file and what is wrong with it."""


@dataclass(frozen=True)
class Segment:
    """A piece of a guest's image: `data`, then zeros up to `size` bytes.

    :ivar ipa: physical address of the first byte
    :ivar data: the file's bytes, where the kernel has them
    """

    ipa: int
    data: "memoryview[int]"
    size: int


@dataclass(frozen=True)
class Image:
    """A guest ready for RAM.

    :ivar entry: address of the first instruction (bit 0: Thumb)
    """

    entry: int
    segments: tuple[Segment, ...]


def read_image(path: Path, board: Board, memory_bytes: int, reserved_bytes: int) -> Image:
    """Read a little-endian executable of the board's architecture and check that all of it lies in RAM, behind the device tree.

    :raise LoadError: When the file cannot be read, is not such an executable, is cut short, or a segment lies outside RAM
        or on the device tree.
    """
    try:
        path.stat()  # says why a file cannot be had; is_file does not
        if not path.is_file():  # opening a pipe would wait for its other end
            raise LoadError(f"kernel {path}: not a regular file")
        with path.open("rb") as file:
            if file.read(4) != b"\x7fELF":
                raise LoadError(f"kernel {path}: not an ELF file")
            file.seek(0)
            image = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            return _parse(path, ELFFile(file), image, board, memory_bytes, reserved_bytes)
    except OSError as error:
        raise LoadError(f"kernel {path}: {error.strerror or error}") from error
    except LoadError:
        raise
    except (ELFError, ValueError, KeyError, OverflowError, UnicodeError, AttributeError, TypeError) as error:
        # The library takes headers at their word and raises whatever their contents lead to.
        raise LoadError(f"kernel {path}: damaged ELF file: {error or type(error).__name__}") from error


def _parse(
    path: Path, elf: ELFFile, file: "memoryview[int]", board: Board, memory_bytes: int, reserved_bytes: int
) -> Image:
    bits, machine = board.architecture.elf
    if elf.elfclass != bits:
        raise LoadError(f"kernel {path}: {elf.elfclass}-bit ELF file, a {board.name} guest is {bits}-bit")
    if not elf.little_endian:
        raise LoadError(f"kernel {path}: big-endian ELF file, a {board.name} guest is little-endian")
    if elf["e_machine"] != machine:
        raise LoadError(f"kernel {path}: ELF file for {elf['e_machine']}, a {board.name} guest is {machine}")
    if elf["e_type"] != "ET_EXEC":
        raise LoadError(
            f"kernel {path}: ELF file of type {elf['e_type']}, a guest is a linked executable (ET_EXEC)"
        )
    if elf.num_segments() > _MAX_SEGMENTS:
        raise LoadError(f"kernel {path}: {elf.num_segments()} segments, the limit is {_MAX_SEGMENTS}")
    segments = []
    for number, header in enumerate(elf.iter_segments("PT_LOAD")):
        start, stored, size = header["p_paddr"], header["p_filesz"], header["p_memsz"]
        if size == 0:
            continue
        what = f"kernel {path}: segment {number} at {start:#x} to {start + size:#x}"
        if stored > size:
            raise LoadError(f"{what} has {stored} bytes in the file, more than in memory")
        if start < board.ram_base or start + size > board.ram_base + memory_bytes:
            raise LoadError(
                f"{what} is outside RAM, {board.ram_base:#x} to {board.ram_base + memory_bytes:#x}"
            )
        if start < board.ram_base + reserved_bytes:
            raise LoadError(
                f"{what} overlaps the device tree, which ends at {board.ram_base + reserved_bytes:#x}"
            )
        at = header["p_offset"]
        if at + stored > len(file):
            raise LoadError(f"{what} is cut short: the file ends at byte {len(file)}")
        segments.append(Segment(start, file[at : at + stored], size))
    entry = elf["e_entry"]
    if not any(segment.ipa <= entry & ~1 < segment.ipa + segment.size for segment in segments):
        raise LoadError(f"kernel {path}: its entry {entry:#x} is in none of its segments")
    return Image(entry, tuple(segments))


def place(
    image: Image, device_tree: bytes, board: Board, write: Callable[[int, bytes | memoryview], None]
) -> None:
    """Put a guest and its device tree into RAM, which is all zeros before.

    :param write: writes bytes to a physical address
    """
    write(board.ram_base, device_tree)
    for segment in image.segments:
        write(segment.ipa, segment.data)
