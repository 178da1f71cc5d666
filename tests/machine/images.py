"""ELF files made by hand, good and bad."""

import struct
from dataclasses import dataclass

HEADER_BYTES, PROGRAM_HEADER_BYTES = 52, 32
EM_ARM, EM_386, EM_X86_64 = 40, 3, 62
PT_LOAD = 1


@dataclass(frozen=True)
class Elf:
    """An ELF file's fields, right for a guest unless said otherwise. Segments are (physical address, bytes, size in memory)."""

    entry: int
    segments: tuple[tuple[int, bytes, int], ...]
    machine: int = EM_ARM
    elf_class: int = 1
    endianness: int = 1
    kind: int = 2

    def build(self) -> bytes:
        order = "<" if self.endianness == 1 else ">"
        ident = b"\x7fELF" + bytes((self.elf_class, self.endianness, 1)) + bytes(9)
        count = len(self.segments)
        header = struct.pack(
            order + "HHIIIIIHHHHHH",
            *(self.kind, self.machine, 1, self.entry, HEADER_BYTES, 0, 0x0500_0000),
            *(HEADER_BYTES, PROGRAM_HEADER_BYTES, count, 40, 0, 0),
        )
        at = HEADER_BYTES + count * PROGRAM_HEADER_BYTES
        headers = data = b""
        for address, content, size in self.segments:
            headers += struct.pack(
                order + "8I", PT_LOAD, at + len(data), address, address, len(content), size, 7, 4
            )
            data += content
        return ident + header + headers + data


@dataclass(frozen=True)
class Elf64:
    """A 64-bit little-endian executable."""

    entry: int
    segments: tuple[tuple[int, bytes, int], ...]
    machine: int = EM_X86_64

    def build(self) -> bytes:
        ident = b"\x7fELF\x02\x01\x01" + bytes(9)
        count, header_bytes, program_header_bytes = len(self.segments), 64, 56
        header = struct.pack(
            "<HHIQQQIHHHHHH",
            *(2, self.machine, 1, self.entry, header_bytes, 0, 0),
            *(header_bytes, program_header_bytes, count, 64, 0, 0),
        )
        at = header_bytes + count * program_header_bytes
        headers = data = b""
        for address, content, size in self.segments:
            where = (PT_LOAD, 7, at + len(data), address, address, len(content), size, 4)
            headers += struct.pack("<IIQQQQQQ", *where)
            data += content
        return ident + header + headers + data


def program(words: list[int], at: int) -> bytes:
    """A guest that consists of these instructions."""
    code = struct.pack(f"<{len(words)}I", *words)
    return Elf(at, ((at, code, len(code)),)).build()
