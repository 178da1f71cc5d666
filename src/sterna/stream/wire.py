"""Numbers of QEMU's migration stream, version 3, and the error that every decoder raises.

Sources: QEMU's ``migration/savevm.h`` (section types, magic), ``migration/savevm.c`` (commands),
``migration/ram.c`` (flags of RAM records), ``migration/migration.c`` (return path messages), as of release
7.2. All integers on the wire are big-endian.
"""

from enum import IntEnum, IntFlag

from sterna.errors import Error

MAGIC = 0x5145564D
"""The first four bytes, ``QEVM``."""
VERSION = 3

RAM_SECTION = "ram"
RAM_VERSION = 4
"""Version of the ``ram`` section that QEMU has written since 2008."""


class SectionType(IntEnum):
    """The byte that opens each part of the stream."""

    EOF = 0x00
    START = 0x01
    PART = 0x02
    END = 0x03
    FULL = 0x04
    SUBSECTION = 0x05
    VMDESCRIPTION = 0x06
    CONFIGURATION = 0x07
    COMMAND = 0x08
    FOOTER = 0x7E


class Command(IntEnum):
    """What a COMMAND part asks of the destination."""

    OPEN_RETURN_PATH = 1
    PING = 2
    POSTCOPY_ADVISE = 3
    POSTCOPY_LISTEN = 4
    POSTCOPY_RUN = 5
    POSTCOPY_RAM_DISCARD = 6
    PACKAGED = 7
    ENABLE_COLO = 8
    POSTCOPY_RESUME = 9
    RECV_BITMAP = 10
    SWITCHOVER_START = 11


class RamFlag(IntFlag):
    """Low bits of a RAM record's first word; the page offset is above them."""

    ZERO = 0x02
    MEM_SIZE = 0x04
    PAGE = 0x08
    EOS = 0x10
    CONTINUE = 0x20
    XBZRLE = 0x40
    HOOK = 0x80
    COMPRESS_PAGE = 0x100
    MULTIFD_FLUSH = 0x200


XBZRLE_ENCODING = 0x01
"""First byte of an XBZRLE record's data, the only encoding there is; two bytes of length and the code follow."""


class ReturnPathType(IntEnum):
    """Messages from the destination back to the source. SWITCHOVER_ACK came with QEMU 8.1."""

    SHUT = 1
    PONG = 2
    REQ_PAGES_ID = 3
    REQ_PAGES = 4
    RECV_BITMAP = 5
    RESUME_ACK = 6
    SWITCHOVER_ACK = 7


LEGACY_ARM_PAGE_BITS = 10
"""Pages of a 32-bit ARM stream whose configuration does not say: QEMU's smallest, 1 KiB (as `vexpress-a15`
sends)."""
ARM_PAGE_BITS = 12

NAME_LIMIT = 255
"""Names carry a one-byte length."""
MACHINE_NAME_LIMIT = 4096
CAPABILITY_LIMIT = 64
VMDESC_LIMIT = 4 << 20
"""Longest machine description that is read; a `virt` machine's has 17 kB. Taken apart, JSON can need 25 times its room."""
RETURN_PATH_LIMIT = 8192
"""Longest payload of a private return path message: room for the digests of the pages of a 2 MiB chunk."""
TAKE_LIMIT = 64 << 20
"""Most bytes that one field of a section may have."""
SECTION_LIMIT = 4096
"""Most sections of one stream."""
RAM_BLOCK_LIMIT = 1024
"""Most RAM blocks of one stream; a `virt` machine has seven."""


class StreamError(Error):
    """The stream cannot be read, or a value cannot be put into it; the text says where.

    :ivar message: what is wrong
    :ivar section: name of the section (and its instance), where one was being read or written
    :ivar field: path of the field within the section, such as ``irq_state[3].level``
    :ivar offset: byte offset in the stream, counted from its first byte
    """

    def __init__(self, message: str, section: str | None = None, offset: int | None = None) -> None:
        super().__init__(message, section, offset)
        self.message = message
        self.section = section
        self.offset = offset
        self.field: str | None = None

    def inside(self, name: str) -> "StreamError":
        """This error, its field path extended outwards by the structure or field that encloses it."""
        separator = "" if self.field is None or self.field.startswith("[") else "."
        self.field = name if self.field is None else f"{name}{separator}{self.field}"
        return self

    def __str__(self) -> str:
        where = [
            f"section {self.section!r}" if self.section is not None else "",
            f"field {self.field!r}" if self.field is not None else "",
            f"offset {self.offset:#x}" if self.offset is not None else "",
        ]
        text = ", ".join(part for part in where if part)
        return f"{text}: {self.message}" if text else self.message


class StreamCut(StreamError):
    """The stream ended too early."""


class StreamUnsupported(StreamError):
    """The stream has something that cannot be read here; whether it is whole, nobody has said."""
