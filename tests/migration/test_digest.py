"""Digests of RAM, and how a difference is found and named."""

import numpy as np
import pytest
import xxhash

from sterna.memory.address import PAGE_SIZE
from sterna.memory.digest import (
    CHUNK_SIZE,
    PIECE_SIZE,
    PIECES_PER_CHUNK,
    RamDigest,
    page_digests,
    populated_chunks,
    populated_pieces,
)
from sterna.memory.ram import RamBlock
from sterna.memory.rollingdigest import digest_ram
from sterna.migration import verify
from sterna.migration.transport.work import HeatMap, SentPages
from sterna.stream.ram.encoder import Batch
from sterna.stream.vmstate import StreamError


def naive(block: RamBlock) -> list[int]:
    data = block.data.tobytes()
    digests = [xxhash.xxh3_64_digest(data[i : i + PIECE_SIZE]) for i in range(0, len(data), PIECE_SIZE)]
    per_chunk = CHUNK_SIZE // PIECE_SIZE
    chunks = [digests[i : i + per_chunk] for i in range(0, len(digests), per_chunk)]
    return [xxhash.xxh3_64_intdigest(b"".join(pieces)) for pieces in chunks]


def test_digests_equal_those_of_all_bytes_and_untouched_memory_stays_untouched() -> None:
    with RamBlock("a", 8 * CHUNK_SIZE + 3 * PAGE_SIZE) as block:
        block.data[5 * CHUNK_SIZE + 17] = 1
        assert populated_chunks(block).tolist() == [False] * 5 + [True] + [False] * 3
        digest = digest_ram([block])
        assert populated_chunks(block).sum() == 1
        assert digest.blocks[0].chunks.tolist() == naive(block)


def test_pieces_have_memory_of_their_own_or_not() -> None:
    with RamBlock("a", 8 * CHUNK_SIZE + 3 * PAGE_SIZE, huge_pages=False) as block:
        block.data[[5 * PIECE_SIZE + 17, block.size - 1]] = 1
        assert np.flatnonzero(populated_pieces(block)).tolist() == [5, 8 * PIECES_PER_CHUNK]
        assert populated_pieces(block, 4, 3).tolist() == [False, True, False]
        assert populated_pieces(block, 8 * PIECES_PER_CHUNK - 1, 9).tolist() == [False, True]


def test_the_root_tells_content_order_and_names() -> None:
    with RamBlock("a", 4 * CHUNK_SIZE) as a, RamBlock("b", 4 * CHUNK_SIZE) as b:
        empty = digest_ram([a]).root
        a.data[0] = 1
        first = digest_ram([a]).root
        a.data[0] = 0
        a.data[CHUNK_SIZE] = 1
        second = digest_ram([a]).root
        b.data[CHUNK_SIZE] = 1
        other = digest_ram([b]).root
        assert len({empty, first, second, other, digest_ram([a, b]).root, digest_ram([b, a]).root}) == 6


def test_a_check_that_raises_ends_the_work() -> None:
    def check() -> None:
        raise TimeoutError

    with RamBlock("a", 2 * CHUNK_SIZE) as block:
        block.data[:] = 1
        with pytest.raises(TimeoutError):
            digest_ram([block], check=check)


def test_the_section_survives_the_wire_and_damage_is_noticed() -> None:
    with RamBlock("a", 3 * CHUNK_SIZE) as a, RamBlock("b", PAGE_SIZE) as b:
        a.data[7] = 9
        digest = digest_ram([a, b])
        body = verify.SECTION.encode(verify.to_state(digest, 77))
        again, devices = verify.from_state(verify.SECTION.decode(body))
        assert again.hex == digest.hex
        assert devices == 77
        assert verify.compare(again, digest) is None
        damaged = bytearray(body)
        damaged[-1] ^= 1
        with pytest.raises(StreamError, match="do not add up"):
            verify.from_state(verify.SECTION.decode(bytes(damaged)))


def be(size: int, value: int) -> bytes:
    return value.to_bytes(size, "big")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (be(4, 1024), "digests of 1024 RAM blocks; there are 1 here"),
        (be(4, 1) + be(4, 1) + b"b" + be(8, PAGE_SIZE) + be(4, 1 << 23), "block 'b', which does not exist"),
        (be(4, 1) + be(4, 1) + b"a" + be(8, 1 << 50) + be(4, 1 << 23), "0x4000000000000 bytes at the source"),
        (be(4, 1) + be(4, 1) + b"a" + be(8, 3 * CHUNK_SIZE) + be(4, 1 << 23), "8388608 digests of RAM block"),
    ],
)
def test_digests_of_other_memory_than_ours_are_not_even_read(body: bytes, text: str) -> None:
    with RamBlock("a", 3 * CHUNK_SIZE) as block:
        section = verify.section_for([block])
        own = verify.SECTION.encode(verify.to_state(digest_ram([block]), 7))
        assert verify.from_state(section.decode(own))[0].hex == digest_ram([block]).hex
        with pytest.raises(StreamError, match=text):
            # Nothing follows the counts: whoever reads on finds the body cut short.
            section.decode(bytes(16) + body)


def test_a_difference_is_located_to_block_page_and_pass() -> None:
    with RamBlock("ram", 4 * CHUNK_SIZE) as ours, RamBlock("ram", 4 * CHUNK_SIZE) as theirs:
        for block in (ours, theirs):
            block.data[2 * CHUNK_SIZE :] = 3
        page = 2 * 512 + 100
        theirs.data[page * PAGE_SIZE + 5] = 4
        different = verify.compare(digest_ram([theirs]), digest_ram([ours]))
        assert different == verify.DigestMismatch("ram", 2)
        last = SentPages([ours])
        last.record(Batch(ours, np.arange(0, 2048)), 1)
        last.record(Batch(ours, np.array([page])), 6)
        text = verify.locate([ours], "ram", 2, page_digests(theirs, 2).astype(">u8").tobytes(), last)
        assert f"RAM block 'ram', page {page} (last sent in pass 6)" in text
        assert "does not exist" in verify.locate([ours], "ram", 99, b"", last)
        assert "does not exist" in verify.locate([ours], "rom", 0, b"", last)


def test_blocks_that_are_not_the_same_differ() -> None:
    with RamBlock("a", PAGE_SIZE) as a, RamBlock("b", PAGE_SIZE) as b:
        one, other = digest_ram([a]), digest_ram([b])
        assert verify.compare(one, other) == verify.DigestMismatch("b", -1)
        both = RamDigest((*one.blocks, *other.blocks))
        assert verify.compare(both, one) == verify.DigestMismatch("b", -1)


def test_pages_that_are_sent_again_are_counted():
    with RamBlock("ram", 5 * PAGE_SIZE) as block:
        sent = SentPages([block])
        for number, pages in enumerate(([0, 1, 2, 3, 4], [1, 4], [4]), 1):
            sent.record(Batch(block, np.array(pages, dtype=np.int64)), number)
        assert sent.heat_maps(2) == [HeatMap("ram", 5, 3, [4, 4], [2, 3])]
        assert (
            sent.heat_maps(5)
            == sent.heat_maps(1000)
            == [HeatMap("ram", 5, 1, [1, 2, 1, 1, 3], [1, 2, 1, 1, 3])]
        )
        assert (sent.pass_of("ram", 1), sent.pass_of("ram", 2)) == (2, 1)
        for number in range(0x10002):
            sent.record(Batch(block, np.array([0], dtype=np.int64)), number)
        assert sent.heat_maps(5)[0].most[0] == sent.pass_of("ram", 0) == 0xFFFF
