"""What the records of guest RAM cost: ns of a processor a page to make them and to take them in, without a network.

    python bench/codec.py [--rounds N] [--against TREE] [CASE ...]

Each round is a process of its own; the table has medians over the rounds. With another checkout of the project, each round runs
that one's `bench/codec.py` too, in turn, and the last column is the difference. Nothing else should use the machine meanwhile.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from sterna.analysis.ram_survey import RamSurveyor
from sterna.jit.ahead import fetch_kernels
from sterna.memory.ram import RamBlock
from sterna.stream.multifd import kernels
from sterna.stream.multifd.format import PacketFormat
from sterna.stream.multifd.packets import IN_THE_BLOCK, head_of, packets_of
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.ram.encoder import BATCH_PAGES, Batch, encode_pages
from sterna.stream.ram.records import bytes_at
from sterna.stream.ram.setup import END_OF_RECORDS, ram_setup
from sterna.stream.reader import StreamReader
from sterna.stream.xbzrle.cache import XbzrleCache

TREE = Path(__file__).parent.parent
PAGES = 8 * BATCH_PAGES
ZERO_PAGES = 32 * BATCH_PAGES
REPEATS, SECONDS = 7, 0.2
"""Of each case in a process, at least; the quickest counts."""


class Memory:
    """A stream that is all there."""

    def __init__(self, data: bytes) -> None:
        self._data = memoryview(data)

    def readinto(self, buffer: memoryview, /) -> int:
        piece, self._data = self._data[: len(buffer)], self._data[len(buffer) :]
        buffer[: len(piece)] = piece
        return len(piece)


def filled(pages: int) -> RamBlock:
    """A block that cannot be compressed."""
    block = RamBlock("ram", pages << 12)
    block.data[:] = np.random.default_rng(1).integers(1, 256, block.size, dtype=np.uint8)
    return block


def batches(pages: int) -> list[np.ndarray]:
    return [np.arange(first, first + BATCH_PAGES, dtype=np.int64) for first in range(0, pages, BATCH_PAGES)]


def records(block: RamBlock) -> bytes:
    """All of its pages, as the body of a part."""
    return encode_pages(block, np.arange(block.pages, dtype=np.int64), suffix=END_OF_RECORDS).tobytes()


def best(run: Callable[[], None], pages: int, prepare: Callable[[], None] = lambda: None) -> float:
    """:return: ns a page"""
    times: list[int] = []
    while len(times) < REPEATS or sum(times) < SECONDS * 1e9:
        prepare()
        started = time.thread_time_ns()
        run()
        times.append(time.thread_time_ns() - started)
    return min(times) / pages


def encode(block: RamBlock) -> Callable[[], None]:
    numbers = batches(block.pages)

    def run() -> None:
        for some in numbers:
            encode_pages(block, some)

    return run


def encode_whole() -> float:
    return best(encode(filled(PAGES)), PAGES)


def encode_zero() -> float:
    block = RamBlock("ram", PAGES << 12)
    block.data[:] = 0  # so that it has memory
    return best(encode(block), PAGES)


def decode(block: RamBlock, data: bytes, *, fresh: bool) -> Callable[[], None]:
    def run() -> None:
        decoder = RamDecoder([block], fresh=fresh)
        decoder.read_records(StreamReader(Memory(data)))

    return run


def decode_whole() -> float:
    source, target = filled(PAGES), RamBlock("ram", PAGES << 12)
    return best(decode(target, records(source), fresh=True), PAGES)


def decode_zero() -> float:
    """Pages that nobody has touched at either end."""
    source, target = RamBlock("ram", ZERO_PAGES << 12), RamBlock("ram", ZERO_PAGES << 12)
    return best(decode(target, records(source), fresh=True), ZERO_PAGES)


def decode_mixed() -> float:
    """A page, then a page that is zero, and so on."""
    source, target = filled(PAGES), RamBlock("ram", PAGES << 12)
    source.data.reshape(-1, 4096)[::2] = 0
    return best(decode(target, records(source), fresh=True), PAGES)


CHANGED = [7, 1000, 1001, 4000]
"""Bytes of each page."""


def change(block: RamBlock) -> None:
    block.data.reshape(-1, 4096)[:, CHANGED] ^= 1


def encode_changes() -> float:
    block, passes = filled(PAGES), itertools.count(2)
    cache, numbers = XbzrleCache([block], PAGES << 12), batches(PAGES)

    def send() -> None:
        number = next(passes)
        for some in numbers:
            cache.encode(Batch(block, some), number)

    send()
    return best(send, PAGES, lambda: change(block))


def decode_changes() -> float:
    source, target = filled(PAGES), RamBlock("ram", PAGES << 12)
    cache = XbzrleCache([source], PAGES << 12)
    decoder = RamDecoder([target])
    decoder.read_records(StreamReader(Memory(records(source))))
    for some in batches(PAGES):
        cache.encode(Batch(source, some), 2)
    change(source)
    wire = b""
    for some in batches(PAGES):
        found = cache.encode(Batch(source, some), 3)
        wire += b"".join(bytes_at(int(address), int(size)) for address, size in found.iov)
    return best(lambda: decoder.read_records(StreamReader(Memory(wire + END_OF_RECORDS))), PAGES)


def lay_out_packets() -> float:
    """As multifd's sender does it: zero pages apart, packets of the others."""
    block = filled(PAGES)
    packet_format = PacketFormat(12)
    head = head_of(packet_format, block)
    numbers = batches(PAGES)

    def run() -> None:
        for pages in numbers:
            zero, whole = np.empty_like(pages), np.empty_like(pages)
            zeros = kernels.split_zero(block.data.view(np.uint64), pages, 12, zero, whole)
            packets_of(packet_format, head, block, whole[: pages.size - zeros], IN_THE_BLOCK, 0)

    return best(run, PAGES)


def survey(source: RamBlock) -> float:
    data = ram_setup([("ram", source.size)]) + records(source)

    def run() -> None:
        surveyor = RamSurveyor(12, digests=False)
        reader = StreamReader(Memory(data))
        surveyor.read_setup(reader)
        surveyor.read_records(reader)

    return best(run, source.pages)


def survey_whole() -> float:
    return survey(filled(PAGES))


def survey_zero() -> float:
    return survey(RamBlock("ram", ZERO_PAGES << 12))


CASES = {
    case.__name__.replace("_", "-"): case
    for case in (
        encode_whole,
        encode_zero,
        encode_changes,
        decode_whole,
        decode_zero,
        decode_mixed,
        decode_changes,
        lay_out_packets,
        survey_whole,
        survey_zero,
    )
}


def measured(tree: Path, cases: list[str]) -> dict[str, float]:
    """One round with what is in a checkout."""
    done = subprocess.run(
        [sys.executable, str(tree / "bench/codec.py"), "--once", *cases],
        env={**os.environ, "PYTHONPATH": str(tree / "src")},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--once", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    arguments = parser.parse_args()
    cases = arguments.cases or list(CASES)
    if unknown := [case for case in cases if case not in CASES]:
        parser.error(f"no case {unknown[0]!r}; there are {', '.join(CASES)}")
    if arguments.once:
        fetch_kernels()
        print(json.dumps({case: CASES[case]() for case in cases}))
        return
    trees = [TREE] if arguments.against is None else [arguments.against, TREE]
    rounds: list[list[dict[str, float]]] = [[] for _ in trees]
    for number in range(arguments.rounds):
        # Who comes first takes turns, too.
        for at in range(len(trees))[:: 1 if number % 2 else -1]:
            rounds[at].append(measured(trees[at], cases))
    print(f"{'ns a page':>16}  " + "  ".join(f"{name:>8}" for name in ("before", "now")[-len(trees) :]))
    for case in cases:
        medians = [statistics.median(one[case] for one in of_tree) for of_tree in rounds]
        row = f"{case:>16}  " + "  ".join(f"{median:8.1f}" for median in medians)
        print(row + (f"  {medians[1] / medians[0] - 1:+7.1%}" if len(medians) == 2 else ""))


if __name__ == "__main__":
    main()
