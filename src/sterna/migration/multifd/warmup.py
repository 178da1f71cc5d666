"""Compiled code of multifd channels, fetched before a migration needs it."""

import socket

import numpy as np

from sterna.memory.address import PAGE_SHIFT, PAGE_SIZE
from sterna.memory.digest import piece_count
from sterna.memory.ram import RamBlock
from sterna.migration.cancellation import Cancellation
from sterna.migration.channels.sockets import SocketChannel
from sterna.migration.multifd import kernels
from sterna.migration.multifd.packets import IN_THE_BLOCK, head_of, packets_of
from sterna.migration.multifd.receivechannel import ReceiveChannel
from sterna.stream.multifd import Packet, PacketFormat


class _LastMeeting:
    """Where the channel learns that it need not go on."""

    def arrive(self, channel: ReceiveChannel) -> bool:
        return False

    def leave(self, channel: ReceiveChannel, error: Exception | None) -> None:
        assert error is None, error


def warm_up() -> None:
    """Have the kernels compiled, so that no migration waits for it: seconds the first time, then from the disk."""
    here, there = socket.socketpair()
    with (
        RamBlock("warm-up", PAGE_SIZE) as block,
        Cancellation() as cancellation,
        SocketChannel(cancellation, "warm-up", here) as sending,
        SocketChannel(cancellation, "warm-up", there) as receiving,
    ):
        packet_format = PacketFormat(PAGE_SHIFT)
        pages = np.zeros(1, dtype=np.int64)
        kernels.split_zero(block.data.view(np.uint64), pages, PAGE_SHIFT, pages.copy(), pages.copy())
        head = head_of(packet_format, block)
        for number in range(2):
            vectors, _headers = packets_of(packet_format, head, block, pages, IN_THE_BLOCK, number)
            sending.send_vectors(vectors)
        sending.send(packet_format.encode(Packet(sync=True)))
        marks = {block.name: np.zeros(piece_count(block.size), dtype=np.uint8)}
        channel = ReceiveChannel(0, receiving, {block.name: block}, PAGE_SHIFT, marks, _LastMeeting())
        channel.start()
        channel.join()
