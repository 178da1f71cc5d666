"""What a source with multifd writes on its channels."""

import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from sterna.memory.ram import RamBlock
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels import uri as uris
from sterna.migration.transport.multifd.sender import MultifdSettings, MultifdTransport
from sterna.migration.transport.ratelimit import RateLimiter
from sterna.migration.transport.records import PART, PART_END, SECTION_END
from sterna.migration.transport.sender import PageSender
from sterna.stream.multifd.format import INIT_BYTES, PacketFormat, decode_init
from sterna.stream.ram.encoder import Batch, zero_records

CHANNELS = 5
TOKEN = b"a token of 16 B."
FORMAT = PacketFormat(12)


def read_all(connection: socket.socket) -> bytes:
    with connection, connection.makefile("rb") as file:
        return file.read()


def packets(data: bytes) -> list[str]:
    """What each packet of a channel is, in order."""
    init = decode_init(data[:INIT_BYTES])
    assert init.token == TOKEN
    at, kinds = INIT_BYTES, []
    while at < len(data):
        packet = FORMAT.decode(data[at : at + FORMAT.header_bytes])
        kinds.append("sync" if packet.sync else "pages")
        at += FORMAT.header_bytes + packet.data_bytes
    return kinds


@pytest.mark.parametrize("zeros", [3, 10_000])
def test_a_stopped_guest_waits_for_one_sync_of_each_channel(tmp_path: Path, zeros: int) -> None:
    """Beside the one of the section's beginning: pages, records and the section's end share it. Records that are too many for
    that end a part of their own.
    """
    whole = 200
    near, far = socket.socketpair()
    received: dict[int, bytes] = {}
    with (
        Cancellation() as cancellation,
        RamBlock("ram", (whole + zeros) << 12) as block,
        socket.socket(socket.AF_UNIX) as listener,
        near,
    ):
        block.data[: whole << 12] = 7
        listener.bind(str(tmp_path / "s"))
        listener.listen(CHANNELS)
        uri = uris.parse(f"unix:{tmp_path}/s")
        assert isinstance(uri, uris.ListeningUri)

        def take(number: int, connection: socket.socket) -> None:
            received[number] = read_all(connection)

        def accept() -> None:
            for number in range(CHANNELS):
                connection, _ = listener.accept()
                reader = threading.Thread(target=take, args=(number, connection))
                reader.start()
                readers.append(reader)

        readers = [threading.Thread(target=take, args=(-1, far))]
        readers[0].start()
        accepting = threading.Thread(target=accept)
        accepting.start()
        with uris.parse(f"fd:{near.fileno()}").connect(cancellation) as main:
            settings = MultifdSettings(CHANNELS, token=TOKEN)
            limiter = RateLimiter(0)
            transport = MultifdTransport(main, uri, settings, limiter, 12, cancellation)
            sender = PageSender(transport, limiter, None)
            sender.send_setup(b"setup")
            sent = sender.send_batch(Batch(block, np.arange(block.pages)), 2, final=True)
            assert (sent.pages, sent.zero_pages) == (whole + zeros, zeros)
            sender.finish_pass(final=True)
            sender.send_end()
            sender.close()
        near.shutdown(socket.SHUT_WR)
        accepting.join(300)
        for reader in readers:
            reader.join(300)
        records = zero_records(block, np.arange(whole, whole + zeros), 12)
    few = zeros < 100
    end = SECTION_END + records + PART_END if few else PART + records + PART_END + SECTION_END + PART_END
    assert received.pop(-1) == b"setup" + end
    kinds = [packets(data) for data in received.values()]
    assert len(kinds) == CHANNELS
    for sent_kinds in kinds:
        pages = sent_kinds.count("pages")
        assert sent_kinds == ["sync", *["pages"] * pages, *["sync"] * (1 if few else 2)]
    assert any("pages" in sent_kinds for sent_kinds in kinds)
