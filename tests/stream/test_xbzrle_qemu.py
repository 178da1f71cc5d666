"""XBZRLE as a real QEMU writes and reads it.

The vCPU of a QEMU under TCG may write a page without the dirty log's knowledge while the log is read, so the
RAM of a QEMU whose guest ran to the end need not be that of its stream, with XBZRLE or without. Here the guest
is paused, and its memory written through QEMU's GDB stub, whose writes are logged.
"""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tests.savedstream import saved, saving
from tests.stream.test_qemu_streams import BOARDS, RAM_BYTES, SECONDS, Board, BytesInPieces, running

from sterna.analysis.survey import survey
from sterna.memory.digest import digest_file
from sterna.memory.ram import RamBlock
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.setup import read_setup
from sterna.stream.reader import SectionPiece, StreamReader
from sterna.stream.sections import Configuration
from sterna.stream.wire import RamFlag, SectionType
from sterna.stream.xbzrle import coding

pytestmark = pytest.mark.qemu

PASSES = 5
PAGES = 64
CODES = 100
SLOW = 130_000
"""Bytes per second: what is written between two passes takes QEMU about a second, in which more is written. A pass after which
nothing is dirty would be its last.
"""
FIRST = 0x400


class Debugger:
    """QEMU's GDB stub, as far as it writes memory."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(SECONDS)
        deadline = time.monotonic() + SECONDS
        while self._socket.connect_ex(str(path)):
            assert time.monotonic() < deadline, "the GDB stub does not listen"
        self._file = self._socket.makefile("rb")

    def _ask(self, text: str) -> bytes:
        self._socket.sendall(f"${text}#{sum(text.encode()) & 0xFF:02x}".encode())
        answer = b""
        while not answer.endswith(b"#"):
            answer += self._file.read(1)
        self._file.read(2)
        self._socket.sendall(b"+")
        return answer.lstrip(b"+")[1:-1]

    def write(self, address: int, data: bytes) -> None:
        for at in range(0, len(data), 1024):
            piece = data[at : at + 1024]
            assert self._ask(f"M{address + at:x},{len(piece):x}:{piece.hex()}") == b"OK"

    def close(self) -> None:
        self._file.close()
        self._socket.close()


def disturb(debugger: Debugger, board: Board, rng: np.random.Generator, number: int) -> None:
    """Write to a page. Every eighth page is written whole: by zeros, or by bytes of which no change is shorter than a page.
    Of the others some bytes and runs change, in one half: however often between two passes, that change is shorter.
    """
    base = board.ram_base + FIRST * 4096 + number * 4096
    if number % 8 == 0:
        debugger.write(
            base, rng.integers(0, 256, 4096, dtype=np.uint8).tobytes() if rng.integers(4) else bytes(4096)
        )
        return
    half = base + number % 2 * 2048
    match int(rng.integers(0, 5)):
        case 0:
            debugger.write(half + 1024, bytes(int(rng.integers(1, 4)) * 200))
        case 1:
            debugger.write(half + 2047, bytes((int(rng.integers(0, 256)),)))
        case _:
            for _ in range(int(rng.integers(1, 5))):
                at, size = int(rng.integers(0, 2048)), int(rng.integers(1, 200))
                data = rng.integers(0, 256, min(size, 2048 - at), dtype=np.uint8)
                debugger.write(half + at, data.tobytes())


def disturb_passes(
    ask: Callable[[str], Any], debugger: Debugger, board: Board, rng: np.random.Generator
) -> None:
    """Write while a QEMU migrates, until it has made passes, and changes, and has met pages whose changes were too long.

    :param ask: the QEMU's QMP
    """
    while True:
        state = ask("query-migrate")
        assert state["status"] in ("setup", "active"), state
        sent = state.get("xbzrle-cache", {"pages": 0, "overflow": 0})
        if (
            state.get("ram", {}).get("dirty-sync-count", 0) >= PASSES
            and sent["pages"] - sent["overflow"] >= CODES
            and sent["overflow"]
        ):
            return
        for number in rng.choice(PAGES, 16, replace=False).tolist():
            disturb(debugger, board, rng, number)


@dataclass(frozen=True)
class Recording:
    board: Board
    stream: bytes
    ram: bytes
    statistics: dict[str, Any]


@pytest.fixture(scope="module", params=BOARDS, ids=lambda board: board.machine)
def recording(request: Any, qemu: str, tmp_path_factory: pytest.TempPathFactory) -> Recording:
    board: Board = request.param
    folder = tmp_path_factory.mktemp("xbzrle")
    rng = np.random.default_rng(4)
    command = [*board.command(qemu), "-gdb", f"unix:{folder / 'gdb'},server=on,wait=off"]
    with running(command, folder / "qmp") as guest, ExitStack() as stack:
        debugger = stack.enter_context(closing(Debugger(folder / "gdb")))
        for number in range(PAGES):
            disturb(debugger, board, rng, number)
        guest("migrate-set-capabilities", capabilities=[{"capability": "xbzrle", "state": True}])
        guest("migrate-set-parameters", **{"max-bandwidth": SLOW, "downtime-limit": 1})
        guest("migrate", uri=saving(folder / "stream"))
        disturb_passes(guest, debugger, board, rng)
        guest("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        assert guest.until("query-migrate", "status", "completed", "failed") == "completed"
        statistics = guest("query-migrate")["xbzrle-cache"]
        guest("pmemsave", val=board.ram_base, size=RAM_BYTES, filename=str(folder / "ram"))
    return Recording(board, saved(folder / "stream"), (folder / "ram").read_bytes(), statistics)


@dataclass
class Change:
    """A page as it was and as it is, and what the stream says of it."""

    before: NDArray[np.uint8]
    after: NDArray[np.uint8]
    code: NDArray[np.uint8]


def changes(recording: Recording) -> Iterator[Change]:
    """All XBZRLE records, applied; the RAM they end with is compared. Records are taken apart here once more."""
    reader = StreamReader(BytesInPieces(recording.stream, 1 << 20))
    configuration = reader.next()
    assert isinstance(configuration, Configuration)
    page_bits = configuration.page_bits or 10
    page_bytes = 1 << page_bits
    assert isinstance(reader.next(), SectionPiece)
    ram: dict[str, NDArray[np.uint8]] = {
        name: np.zeros(size, dtype=np.uint8) for name, size in read_setup(reader, page_bits)
    }
    name = ""
    while isinstance(event := reader.next(), SectionPiece) and event.type is not SectionType.FULL:
        while (word := int.from_bytes(reader.take(8), "big")) != RamFlag.EOS:
            flags, offset = RamFlag(word & (page_bytes - 1)), word & -page_bytes
            if not flags & RamFlag.CONTINUE:
                name = reader.take(reader.take(1)[0]).decode()
            page = ram[name][offset : offset + page_bytes]
            if flags & RamFlag.ZERO:
                page[:] = reader.take(1)[0]
            elif flags & RamFlag.PAGE:
                page[:] = bytearray(reader.take(page_bytes))
            else:
                assert flags & ~RamFlag.CONTINUE == RamFlag.XBZRLE
                assert reader.take(1) == b"\1"
                code = np.array(bytearray(reader.take(int.from_bytes(reader.take(2), "big"))), dtype=np.uint8)
                before = page.copy()
                assert coding.check(code, page.size)[0] == 0
                coding.apply(code, page)
                yield Change(before, page.copy(), code)
    assert ram[recording.board.ram_name].tobytes() == recording.ram


def test_qemus_codes_are_the_ones_made_here(recording: Recording) -> None:
    found = list(changes(recording))
    for change in found:
        out = np.empty_like(change.before)
        length = coding.encode(change.before.view(np.uint64), change.after.view(np.uint64), out)
        assert out[:length].tobytes() == change.code.tobytes()
    statistics = recording.statistics
    assert len(found) <= statistics["pages"] - statistics["overflow"]
    assert len(found) > CODES // 2  # a page may have become again what it was
    assert statistics["overflow"] > 0


def test_a_decoder_ends_with_qemus_ram(recording: Recording) -> None:
    reader = StreamReader(BytesInPieces(recording.stream, 5000))
    configuration = reader.next()
    assert isinstance(configuration, Configuration)
    assert isinstance(reader.next(), SectionPiece)
    page_bits = configuration.page_bits or 10
    blocks = [RamBlock(name, size) for name, size in read_setup(reader, page_bits)]
    decoder = RamDecoder(blocks, page_bits)
    while isinstance(event := reader.next(), SectionPiece) and event.type is not SectionType.FULL:
        decoder.read_records(reader)
    assert decoder.statistics().changed == len(list(changes(recording)))
    (ram,) = (block for block in blocks if block.name == recording.board.ram_name)
    assert ram.data.tobytes() == recording.ram


def test_a_survey_ends_with_qemus_ram(recording: Recording) -> None:
    found = survey(BytesInPieces(recording.stream, 5000), digests=True)
    assert found.flaw() is None
    changed = list(changes(recording))
    assert sum(block.changed for block in found.blocks) == len(changed)
    assert sum(change.code.size for change in changed) < found.kinds.changes
    assert len(found.passes) >= PASSES - 1
    assert found.digest is not None
    name = recording.board.ram_name
    [ram] = (block for block in found.digest.blocks if block.block == name)
    assert ram.hex == digest_file(name, BytesIO(recording.ram)).hex
