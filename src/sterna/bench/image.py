"""A guest's image with content for its RAM: the shipped program, and one large segment."""

import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from sterna.bench.workloads import Content
from sterna.guests import catalog
from sterna.guests.layout import WORK_OFFSET

# ELF-32, System V ABI: sizes of the file header and of a program header, and where a header has what is used here.
_HEADER = struct.Struct("<16sHHIIIIIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<8I")
_PT_LOAD = 1
_READ_WRITE = 6
_PIECE = 64 << 20


@contextmanager
def guest_image(
    program: str, board: str, ram_base: int, memory_bytes: int, content: Content
) -> Iterator[str]:
    """The path of an image that fills RAM from `WORK_OFFSET` to its end with `content`, for any process of
    this user while the `with` statement lasts. Without content that is the shipped image.

    The file has no place on a disk: reading it costs what reading memory costs.
    """
    shipped = catalog.find(program, board)
    if content is Content.NONE:
        yield str(shipped)
        return
    fd = os.memfd_create("sterna-guest", os.MFD_CLOEXEC)
    try:
        at = _write_program(fd, shipped.read_bytes(), ram_base + WORK_OFFSET, memory_bytes - WORK_OFFSET)
        os.truncate(fd, at + memory_bytes - WORK_OFFSET)
        if content is Content.RANDOM:
            _fill(fd, at, memory_bytes - WORK_OFFSET)
        yield f"/proc/{os.getpid()}/fd/{fd}"
    finally:
        os.close(fd)


def _write_program(fd: int, image: bytes, address: int, size: int) -> int:
    """The program's segments, and the header of one more.

    :return: where in the file that one's bytes belong
    """
    fields = list(_HEADER.unpack_from(image))
    first, entry_size, count = fields[5], fields[9], fields[10]
    headers = [list(_PROGRAM_HEADER.unpack_from(image, first + i * entry_size)) for i in range(count)]
    headers = [header for header in headers if header[0] == _PT_LOAD]
    at = _HEADER.size + (len(headers) + 1) * _PROGRAM_HEADER.size
    body = b""
    for header in headers:
        stored = image[header[1] : header[1] + header[4]]
        header[1] = at + len(body)
        body += stored
    end = at + len(body)
    headers.append([_PT_LOAD, end, address, address, size, size, _READ_WRITE, 1])
    # Program headers follow the file header; there are no sections.
    fields[5], fields[6], fields[10], fields[11:14] = _HEADER.size, 0, len(headers), (0, 0, 0)
    os.write(fd, _HEADER.pack(*fields) + b"".join(_PROGRAM_HEADER.pack(*header) for header in headers) + body)
    return end


def _fill(fd: int, at: int, size: int) -> None:
    """Random bytes, the same each time."""
    generator = np.random.default_rng(1)
    while size:
        piece = min(size, _PIECE)
        os.pwrite(fd, generator.bytes(piece), at)
        at, size = at + piece, size - piece
