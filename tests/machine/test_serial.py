"""Serial lines: files, sockets, memory."""

import os
import socket
import threading

import pytest
from tests.refusal import refuse_threads

from sterna.machine.config import MEBIBYTE, MachineConfig
from sterna.machine.machine import Machine
from sterna.machine.nicconfig import parse_nic
from sterna.machine.serial import DescriptorSerial, NullSerial, SerialError, open_serial
from sterna.machine.tap import TapError

TIMEOUT_S = 300


class Input:
    """What a line handed to its UART."""

    def __init__(self):
        self.data = bytearray()
        self._changed = threading.Condition()

    def __call__(self, data):
        with self._changed:
            self.data += data
            self._changed.notify_all()

    def wait_for(self, text):
        with self._changed:
            return self._changed.wait_for(lambda: text in self.data, TIMEOUT_S)


def test_null_drops_everything():
    line = open_serial("null")
    assert isinstance(line, NullSerial)
    line.write(b"x")
    line.close()


def test_file(tmp_path):
    line = open_serial(f"file:{tmp_path / 'log'}")
    line.start(Input())
    line.write(b"hello")
    line.close()
    assert (tmp_path / "log").read_bytes() == b"hello"


def test_a_file_is_emptied_when_the_machine_is_there(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"what the guest before said")
    line = open_serial(f"file:{log}")
    assert log.read_bytes() == b"what the guest before said"
    line.start(Input())
    assert log.read_bytes() == b""
    line.write(b"hello")
    line.close()
    assert log.read_bytes() == b"hello"


def test_a_machine_that_cannot_be_made_leaves_the_log_of_the_one_before(tmp_path):
    log = tmp_path / "log"
    log.write_bytes(b"what the guest before said")
    card = parse_nic("tap,fd=987")
    with pytest.raises(TapError):
        Machine(
            MachineConfig(
                memory_bytes=16 * MEBIBYTE,
                kernel="clock",
                append="20",
                serial=f"file:{log}",
                nics=(card,),
            )
        )
    assert log.read_bytes() == b"what the guest before said"


def test_a_pipe_needs_a_reader(tmp_path):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    with pytest.raises(SerialError, match="No such device or address"):
        open_serial(f"file:{fifo}")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    line = open_serial(f"file:{fifo}")
    line.start(Input())
    line.write(b"hello")
    line.close()
    assert os.read(reader, 100) == b"hello"
    os.close(reader)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tty", "'tty' is not known"),
        ("file:", "path is missing"),
        ("unix:", "path is missing"),
        ("unix:,server", "path is missing"),
        ("file:/nonexistent/x", "No such file"),
        ("unix:/nonexistent/x", "No such file"),
        ("unix:" + "x" * 200, "too long"),
        ("file:a\0b", "null"),
    ],
)
def test_lines_that_cannot_be_opened(text, message):
    with pytest.raises(SerialError, match=message):
        open_serial(text)


def test_descriptors_carry_both_ways():
    to_guest_read, to_guest_write = os.pipe()
    from_guest_read, from_guest_write = os.pipe()
    line = DescriptorSerial("stdio", from_guest_write, to_guest_read, owned=False)
    received = Input()
    line.start(received)
    os.write(to_guest_write, b"in")
    assert received.wait_for(b"in")
    line.write(b"out")
    assert os.read(from_guest_read, 10) == b"out"
    line.close()
    os.close(from_guest_read)
    for descriptor in (to_guest_read, to_guest_write, from_guest_write):
        os.close(descriptor)


def test_output_that_is_lost_does_not_stop_the_guest_and_is_told_once(caplog):
    reader, writer = os.pipe()
    os.close(reader)
    broken = DescriptorSerial("stdio", writer, None, owned=True)
    for line, why in (
        (broken, "serial stdio: what the guest writes is lost: Broken pipe"),
        (
            open_serial("file:/dev/full"),
            "serial file:/dev/full: what the guest writes is lost: No space left on device",
        ),
    ):
        line.write(b"x" * 8192)  # two writes
        line.close()
        assert [record.getMessage() for record in caplog.records] == [why]
        caplog.clear()


def test_unix_socket_serves_one_peer_after_another(tmp_path):
    path = tmp_path / "serial"
    line = open_serial(f"unix:{path}")
    received = Input()
    line.start(received)
    line.write(b"nobody listens")
    for text in (b"first", b"second"):
        with socket.socket(socket.AF_UNIX) as peer:
            peer.settimeout(TIMEOUT_S)
            peer.connect(str(path))
            peer.sendall(text)
            assert received.wait_for(text)
            line.write(b"answer")
            assert peer.recv(10) == b"answer"
    line.close()
    assert not path.exists()


def test_a_peer_that_does_not_read_never_blocks(tmp_path):
    path = tmp_path / "serial"
    line = open_serial(f"unix:{path}")
    received = Input()
    line.start(received)
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(path))
        peer.sendall(b"here")
        assert received.wait_for(b"here")
        for _ in range(1000):
            line.write(b"x" * 4096)
    line.close()


def test_a_reader_that_stops_reading_does_not_stop_the_guest():
    reader, writer = os.pipe()
    line = DescriptorSerial("stdio", writer, None, owned=True)
    for _ in range(40):
        line.write(b"x" * 50_000)  # more than the pipe and the queue take
    line.close()
    os.close(reader)


def test_output_is_all_written_before_the_line_closes():
    reader, writer = os.pipe()
    line = DescriptorSerial("stdio", writer, None, owned=True)
    for number in range(1000):
        line.write(b"%d\n" % number)
    line.close()
    with os.fdopen(reader, "rb") as file:
        assert file.read().splitlines() == [b"%d" % number for number in range(1000)]


def test_a_line_whose_thread_cannot_be_had_is_closed_all_the_same(tmp_path, monkeypatch):
    refuse_threads(monkeypatch, "serial", times=2)
    path = tmp_path / "socket"
    before = set(threading.enumerate())
    with pytest.raises(RuntimeError, match="can't start new thread"):
        Machine(MachineConfig(memory_bytes=32 * MEBIBYTE, serial=f"unix:{path}"))
    assert not path.exists()
    reader, writer = os.pipe()
    line = DescriptorSerial("pipe", writer, reader, owned=False)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        line.start(Input())
    line.close()
    assert set(threading.enumerate()) <= before
    os.close(reader)
    os.close(writer)
