"""The guests' reader of device trees, compiled for the host: right on good trees, within bounds on any bytes."""

import ctypes
import mmap
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import fdt
import pytest

from sterna.guests.build import SOURCES

RAM = 0x40000000
LIMIT = 1 << 16


class Machine(ctypes.Structure):
    _fields_ = (
        ("ram_bytes", ctypes.c_uint64),
        ("cpus", ctypes.c_uint32),
        ("bootargs", ctypes.c_void_p),
        ("bootargs_length", ctypes.c_uint32),
    )


class Reader:
    """fdt_read on a blob that ends where readable memory ends."""

    def __init__(self, folder: Path) -> None:
        library = folder / "fdt.so"
        command = [
            sys.executable,
            "-m",
            "ziglang",
            "cc",
            "-shared",
            "-fPIC",
            "-O1",
            "-o",
            str(library),
            "fdt.c",
        ]
        subprocess.run(command, cwd=SOURCES, check=True)
        self._read = ctypes.CDLL(str(library)).fdt_read
        self._read.argtypes = [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(Machine)]
        self._memory = mmap.mmap(-1, LIMIT + mmap.PAGESIZE)
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.mprotect(ctypes.c_void_p(self._start + LIMIT), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0

    def read(self, blob: bytes) -> tuple[int, int, int, str | None]:
        machine = Machine()
        at = LIMIT - len(blob)
        self._memory[at:LIMIT] = blob
        result = self._read(self._start + at, len(blob), RAM, ctypes.byref(machine))
        text = None
        if machine.bootargs:
            offset = machine.bootargs - self._start - at
            assert 0 <= offset <= len(blob) - machine.bootargs_length
            text = blob[offset : offset + machine.bootargs_length].decode("latin-1")
        return result, machine.ram_bytes, machine.cpus, text


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Reader:
    return Reader(tmp_path_factory.mktemp("fdt"))


def tree(cells: tuple[int, int] = (2, 2), cpus: int = 3, bootargs: str | None = "4096 64 10") -> bytes:
    blob = fdt.FDT()
    blob.header.version = 17
    properties: list[tuple[str, str, Any]] = [
        ("/", "#address-cells", cells[0]),
        ("/", "#size-cells", cells[1]),
    ]
    address, size = [0, RAM][2 - cells[0] :], [1, 0x70000000][2 - cells[1] :]
    # Neither a memory node below another, nor a region elsewhere, nor bootargs in another node count.
    properties += [
        ("/other/memory@0", "reg", [*address, *size[:-1], 0x1000]),
        ("/other", "bootargs", "wrong"),
    ]
    properties += [("/memory@0", "reg", [*([0] * cells[0]), *([9] * cells[1]), *address, *size])]
    properties += [("/cpus", "#address-cells", 1), ("/cpus", "#size-cells", 0), ("/cpus/cpu-map", "x", 1)]
    properties += [(f"/cpus/cpu@{cpu}", "reg", cpu) for cpu in range(cpus)]
    if bootargs is not None:
        properties.append(("/chosen", "bootargs", bootargs.encode() + b"\0"))
    for path, name, value in properties:
        blob.set_property(name, value, path)
    return bytes(blob.to_dtb(17))


def test_good_trees(reader: Reader) -> None:
    assert reader.read(tree()) == (1, 0x170000000, 3, "4096 64 10")
    assert reader.read(tree(cells=(1, 1), cpus=1)) == (1, 0x70000000, 1, "4096 64 10")
    assert reader.read(tree(bootargs=None)) == (1, 0x170000000, 3, None)
    assert reader.read(tree(bootargs="")) == (1, 0x170000000, 3, "")


def test_no_tree(reader: Reader) -> None:
    assert reader.read(bytes(64)) == (0, 0, 0, None)


def test_every_cut_is_told(reader: Reader) -> None:
    blob = tree()
    for length in range(40, len(blob)):
        cut = bytearray(blob[:length])
        assert reader.read(bytes(cut))[0] == -1
        cut[4:8] = length.to_bytes(4, "big")  # and a header that agrees
        assert reader.read(bytes(cut))[0] == -1


def test_damaged_trees_stay_within_bounds(reader: Reader) -> None:
    blob, source = tree(), random.Random(1)
    results = set()
    for _ in range(20000):
        damaged = bytearray(blob)
        for _ in range(source.choice((1, 1, 2, 8))):
            at = source.randrange(4, len(blob) - 4)
            if source.random() < 0.5:
                damaged[at] = source.randrange(256)
            else:
                word = source.choice(
                    (0, 1, 2, 3, 9, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF, len(blob))
                )
                damaged[at & ~3 : (at & ~3) + 4] = word.to_bytes(4, "big")
        results.add(reader.read(bytes(damaged))[0])
    assert results == {-1, 1}


def test_deep_nesting_is_refused(reader: Reader) -> None:
    nested = (b"\0\0\0\1" + b"x\0\0\0") * 33 + b"\0\0\0\2" * 33 + b"\0\0\0\x09"
    header = [0xD00DFEED, 40 + len(nested), 40, 40 + len(nested), 40, 17, 16, 0, 0, len(nested)]
    assert reader.read(b"".join(word.to_bytes(4, "big") for word in header) + nested)[0] == -1
