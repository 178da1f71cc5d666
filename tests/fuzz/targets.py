"""What is fuzzed: one function for each decoder, or group of them, that reads a peer's bytes.

A target returns what the decoder said, as a text from which the fuzzer tells whether it is something new. It raises
when the decoder raised anything but its own errors, wrote where it must not, or broke a rule that always holds.
"""

import json
import os
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from tests.fuzz.corpus import PAGES, description_of
from tests.fuzz.parts import Parts
from tests.jit.plain import plain
from tests.monitor.machines import monitored
from tests.stream.streams import PieceSource

from sterna.analysis import ram_survey
from sterna.analysis.channel_survey import ChannelInput, StoredChannels
from sterna.analysis.compare import compare
from sterna.analysis.proxy.answers import Answers
from sterna.analysis.survey import survey
from sterna.cli.streamreport import survey_report, to_json
from sterna.host import units
from sterna.memory.ram import RamBlock
from sterna.migration import handshake, outcome_query, peer, verify
from sterna.migration.controller import MigrationController
from sterna.migration.destination.multifd import receiver
from sterna.migration.errors import ChannelError, ProtocolError
from sterna.migration.statistics import MigrationStatus
from sterna.monitor import dump, protocol
from sterna.monitor.client import ConnectionLost, QmpClient
from sterna.monitor.commands import Commands
from sterna.monitor.framing import FramingError, JsonFramer
from sterna.monitor.hmp import HumanMonitor
from sterna.monitor.hmpvalues import parse_parameter
from sterna.monitor.protocol import QmpError
from sterna.stream.body import BytesSource
from sterna.stream.description import Descriptions, find_description
from sterna.stream.multifd.compression import Decompressor
from sterna.stream.multifd.format import Compression, PacketFormat, decode_init
from sterna.stream.ram.decoder import RamDecoder
from sterna.stream.reader import CommandPiece, SectionPiece, StreamReader
from sterna.stream.return_path import ReturnPathDecoder
from sterna.stream.sections import Configuration
from sterna.stream.wire import SectionType, StreamError
from sterna.stream.xbzrle import coding
from sterna.testing.guest import DoubleGuest

SECONDS = 60.0
"""How long a migration may take to notice what is wrong."""
Run = Callable[[Parts, random.Random], str]
NUMBERS = re.compile(r"/tmp/\w+|(?:0x)?[0-9a-f]*\d[0-9a-f]*|'[^']*'|`[^`]*`")


def said(error: Exception) -> str:
    """An error without what differs from input to input; it must be one line of bounded length."""
    text = str(error)
    assert len(text) < 4000, f"an error of {len(text)} characters: {text[:200]!r}"
    return f"{type(error).__name__}: {NUMBERS.sub('#', text)[:160]}"


class GuardedBlock(RamBlock):
    """Guest RAM between two fences, which nothing may touch."""

    FENCE = 1 << 16

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size + 2 * self.FENCE)
        self._whole = self.data
        self._whole[: self.FENCE] = self._whole[-self.FENCE :] = 0xA5
        self.size = size
        self.data = self._whole[self.FENCE : self.FENCE + size]
        self.hva = type(self.hva)(self.hva + self.FENCE)

    def check(self) -> None:
        assert (self._whole[: self.FENCE] == 0xA5).all(), "memory before the RAM block was written"
        assert (self._whole[-self.FENCE :] == 0xA5).all(), "memory after the RAM block was written"

    def close(self) -> None:
        del self._whole
        super().close()


# -- streams --------------------------------------------------------------------------------------------------


def reader(parts: Parts, rng: random.Random) -> str:
    """The frame, RAM records into guarded memory, devices by the stream's own description."""
    data = parts[0]
    try:
        descriptions: Descriptions | None = Descriptions(find_description(data) or description_of(data))
    except StreamError:
        descriptions = None
    reader = StreamReader(PieceSource(data, rng.choice((None, 1000, 5, 1 << 16))), 1 << 17)
    with GuardedBlock("double.ram", PAGES << 12) as one, GuardedBlock("mach-virt.ram", 16 << 20) as two:
        blocks = [two if b"mach-virt.ram" in data[:4096] else one]
        decoder = RamDecoder(blocks, rng.choice((12, 12, 12, 10)), fresh=True)
        try:
            while (event := reader.next()) is not None:
                match event:
                    case SectionPiece(SectionType.START, header) if header.name == "ram":
                        decoder.read_setup(reader)
                    case SectionPiece(SectionType.PART | SectionType.END, header) if header.name == "ram":
                        decoder.read_records(reader)
                    case SectionPiece(_, header):
                        if descriptions is None:
                            return "not described"
                        reader.read_state(descriptions[header.name, header.instance_id])
                    case Configuration() | CommandPiece():
                        pass
            return "read"
        except StreamError as error:
            return said(error)
        finally:
            one.check()
            two.check()


def surveyed(parts: Parts, rng: random.Random) -> str:
    """A survey with its channels, its report, and a comparison with itself."""
    main, *channels = parts
    sources = [ChannelInput(f"channel {i}", PieceSource(data, 3000)) for i, data in enumerate(channels)]
    digests = rng.random() < 0.5
    with patch.object(ram_survey, "free_bytes", lambda: 64 << 20):
        found = survey(
            PieceSource(main, rng.choice((None, None, 777))),
            description=find_description(main) if rng.random() < 0.5 else None,
            page_digests=digests,
            channels=StoredChannels(sources) if sources else None,
        )
    assert sum(asdict(found.kinds).values()) == found.total_bytes <= sum(map(len, parts))
    assert sum(one.normal + one.zero + one.changed for one in found.passes) == sum(
        one.normal + one.zero + one.changed for one in found.blocks
    )
    json.loads(to_json(survey_report(found)))
    flaw = found.flaw()
    if found.fault is None:
        # Without RAM, which is a flaw, there is nothing to read channels for.
        assert found.total_bytes == sum(map(len, parts if found.blocks else parts[:1]))
        assert not digests or not found.blocks or found.digest is not None
        assert not digests or compare(found, found).equal
    if flaw is None:
        return "whole"
    assert "\n" not in flaw.text
    assert len(flaw.text) < 4000
    return NUMBERS.sub("#", flaw.text)[:160]


def description(parts: Parts, rng: random.Random) -> str:
    """A description, and a device's bytes read by it."""
    text, devices = parts if len(parts) == 2 else (parts[0], b"")
    try:
        found = Descriptions(text)
        for key in list(found):
            body = BytesSource(devices[rng.randrange(len(devices) + 1) :])
            try:
                found[key].decode(body, name=key[0], instance_id=key[1], version=rng.choice((1, 22)))
            except StreamError as error:
                said(error)
        return f"{len(list(found))} devices"
    except StreamError as error:
        return said(error)


def digest_section(parts: Parts, rng: random.Random) -> str:
    """Digests of RAM as the destination reads them."""
    body = parts[0]
    with RamBlock("double.ram", PAGES << 12) as block:
        table = verify.section_for([block]) if rng.random() < 0.8 else verify.SECTION
        try:
            state = table.decode(BytesSource(body), name=table.name, instance_id=0, version=1)
            verify.from_state(state)
            return "digests"
        except StreamError as error:
            return said(error)


def delta(parts: Parts, rng: random.Random) -> str:
    """An XBZRLE code, applied to a guarded page compiled and not."""
    code = np.frombuffer(parts[0][:4096], dtype=np.uint8).copy()
    page = np.full(3 * 4096, 0xA5, dtype=np.uint8)
    page[4096:8192] = np.arange(4096) & 0xFF
    other = page[4096:8192].copy()
    fault, where = (int(value) for value in coding.check(code, 4096))
    assert (fault, where) == plain(coding.check)(code, 4096)
    if fault == coding.CodeFault.NONE:
        coding.apply(code, page[4096:8192])
        plain(coding.apply)(code, other)
    assert np.array_equal(other, page[4096:8192])
    assert (page[:4096] == 0xA5).all()
    assert (page[8192:] == 0xA5).all()
    return coding.CodeFault(fault).text


def packets(parts: Parts, rng: random.Random) -> str:
    """Multifd's initial packet, headers and compressed pages."""
    data = parts[0]
    format = PacketFormat(rng.choice((12, 12, 10)))
    at = 0
    try:
        at += 64 if decode_init(data[:64]).id >= 0 else 0
        coders = {kind: Decompressor(kind) for kind in (Compression.ZLIB, Compression.ZSTD)}
        while len(data) - at >= format.header_bytes:
            packet = format.decode(data[at : at + format.header_bytes])
            at += format.header_bytes
            size = packet.pages.size << format.page_bits
            body = data[at : at + packet.data_bytes]
            at += packet.data_bytes
            assert size <= 512 << 10
            if packet.compression is not Compression.NONE:
                assert len(coders[packet.compression].decompress(body, size)) == size
        return "packets"
    except StreamError as error:
        return said(error)


def inflated(parts: Parts, rng: random.Random) -> str:
    """Damaged compressed pages: never more bytes than were asked for."""
    kind = rng.choice((Compression.ZLIB, Compression.ZSTD))
    data = parts[0]
    try:
        assert len(Decompressor(kind).decompress(data, 4096)) == 4096
        return "pages"
    except StreamError as error:
        return said(error)


# -- the two ends ---------------------------------------------------------------------------------------------


@contextmanager
def _impatient() -> Iterator[None]:
    with patch.object(receiver, "CONNECT_SECONDS", 0.05), patch.object(peer, "GREETING_SECONDS", 0.2):
        yield


def destination(parts: Parts, rng: random.Random) -> str:
    """A machine that waits for a guest is fed the streams on sockets, the main one first."""
    with TemporaryDirectory() as folder, _impatient():
        guest = DoubleGuest(PAGES, running=False)
        try:
            with MigrationController(guest) as controller:
                controller.set_capabilities({"multifd": len(parts) > 1})
                controller.set_parameters({"multifd-channels": max(1, len(parts) - 1)})
                if b"\x78\x01" in parts[-1][:8192]:
                    controller.set_parameters({"multifd-compression": "zlib"})
                controller.incoming(f"unix:{folder}/in")
                _feed(f"{folder}/in", parts)
                if not any(len(data) >= 8 and data[:4] != b"\x11\x22\x33\x44" for data in parts):
                    return "no stream"
                info = controller.wait(SECONDS)
                assert not info.status.running, ("it does not end", info)
                assert guest.running == (info.status is MigrationStatus.COMPLETED)
                if not guest.running:
                    assert not guest.block.data.any(), "RAM of a guest that never came"
                return info.status.value + NUMBERS.sub("#", info.error)[:160]
        finally:
            guest.close()


def machine(parts: Parts, rng: random.Random) -> str:
    """A real machine takes in a guest, and runs it for a moment if it can."""
    with TemporaryDirectory() as folder, monitored(Path(folder) / "qmp", incoming="defer") as there:
        (Path(folder) / "stream").write_bytes(parts[0])
        there.migration.incoming(f"file:{folder}/stream")
        info = there.migration.wait(SECONDS)
        assert not info.status.running, ("it does not end", info)
        completed = info.status is MigrationStatus.COMPLETED
        assert completed or there.machine.run_state.value != "running"
        return info.status.value + NUMBERS.sub("#", info.error)[:160]


def _feed(path: str, parts: Parts) -> None:
    senders = []
    for data in parts:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        senders.append(threading.Thread(target=_send, args=(connection, data), daemon=True))
        senders[-1].start()
    for sender in senders:
        sender.join(SECONDS)
        assert not sender.is_alive(), "the destination holds on to a connection that says nothing more"


def _send(connection: socket.socket, data: bytes) -> None:
    with connection:
        connection.settimeout(SECONDS)
        try:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 16):
                pass
        except OSError:
            pass


def source(parts: Parts, rng: random.Random) -> str:
    """A machine migrates to something that gives these answers, whatever it is sent."""
    guest = DoubleGuest(3, steps_per_ms=0)
    guest.advance_steps(1)
    with TemporaryDirectory() as folder, _impatient(), socket.socket(socket.AF_UNIX) as server:
        server.bind(f"{folder}/s")
        server.listen(8)
        ended = threading.Event()
        thread = threading.Thread(target=_answer_all, args=(server, parts[0], ended), daemon=True)
        thread.start()
        try:
            with MigrationController(guest) as controller:
                controller.set_parameters({"x-sterna-switchover-timeout": 200, "x-sterna-doubt-timeout": 200})
                controller.migrate(f"unix:{folder}/s")
                info = controller.wait(SECONDS)
                assert not info.status.running, ("it does not end", info)
                gone = info.status is MigrationStatus.COMPLETED or info.in_doubt
                assert guest.running != gone, (guest.running, info)
                return info.status.value + NUMBERS.sub("#", info.error)[:160]
        finally:
            ended.set()
            server.shutdown(socket.SHUT_RDWR)
            thread.join(SECONDS)
            guest.close()


def _answer_all(server: socket.socket, data: bytes, ended: threading.Event) -> None:
    while not ended.is_set():
        try:
            connection, _ = server.accept()
        except OSError:
            return
        _send(connection, data)


def return_path(parts: Parts, rng: random.Random) -> str:
    """Messages to the source, their payloads, and the proxy that overhears them; in pieces or at once."""
    data = parts[0]
    whole, pieces = ReturnPathDecoder(), ReturnPathDecoder()
    results = []
    for decoder, step in ((whole, max(1, len(data))), (pieces, rng.choice((1, 3, 50)))):
        messages, error = [], ""
        try:
            for at in range(0, len(data), step):
                messages += decoder.feed(data[at : at + step])
            decoder.close()
        except StreamError as caught:
            error = said(caught)
        results.append((messages, error))
    assert results[0] == results[1]
    answers = Answers()
    for at in range(0, len(data), 7):
        answers.feed(memoryview(data)[at : at + 7])
    kinds = (
        handshake.Hello,
        handshake.Offer,
        handshake.Ready,
        handshake.Nack,
        handshake.Commit,
        handshake.Running,
    )
    for message in results[1][0]:
        for kind in kinds:
            for payload in (message.payload, _signed(message.payload)):
                try:
                    handshake.decode(payload, kind)
                except ProtocolError as error:
                    said(error)
    return results[1][1] or f"{len(results[1][0])} messages"


def _signed(payload: bytes) -> bytes:
    """A payload with the right checksum, so that what is in it counts."""
    import xxhash

    return payload[:-4] + xxhash.xxh32_digest(payload[:-4])


def answer(parts: Parts, rng: random.Random) -> str:
    """The answer to the question who runs a guest."""
    data = parts[0][: outcome_query.ANSWER_BYTES].ljust(outcome_query.ANSWER_BYTES, b"\0")
    if rng.random() < 0.7:
        data = b"STRNANS1" + data[8:]
    if rng.random() < 0.8:
        data = _signed(data)
    try:
        return str(outcome_query.decode_answer(data, "peer")[0])
    except ChannelError as error:
        return said(error)


# -- monitors -------------------------------------------------------------------------------------------------


def qmp(parts: Parts, rng: random.Random) -> str:
    """QMP's framing, in pieces or at once, and requests."""
    data = parts[0]
    results = []
    for step in (max(1, len(data)), rng.choice((1, 2, 9))):
        framer = JsonFramer(1 << 12)
        texts = [
            str(text) if isinstance(text, FramingError) else text
            for at in range(0, len(data), step)
            for text in framer.feed(data[at : at + step])
        ]
        results.append(texts)
    if len(data) < 1 << 12:
        assert results[0] == results[1]
    outcome = ""
    for text in results[1]:
        if isinstance(text, str):
            outcome = text
            continue
        try:
            request = protocol.parse_request(text)
            outcome = f"{len(request.arguments)} arguments"
        except QmpError as error:
            outcome = said(error)
    return outcome


_FORBIDDEN = re.compile(rb"exec:|file|fd:|q(uit)?\b|incoming|tcp|unix|save")
"""Commands that would do something outside of the machine, whatever they have become."""


def commands(parts: Parts, rng: random.Random) -> str:
    """Requests and lines that reach a machine: whatever they say, an answer comes."""
    with TemporaryDirectory() as folder, monitored(Path(folder) / "qmp") as machine:
        table, monitor = Commands(machine.control), HumanMonitor(machine.control)
        outcome = ""
        for text in JsonFramer().feed(parts[0]):
            if isinstance(text, FramingError) or _FORBIDDEN.search(text):
                continue
            try:
                request = protocol.parse_request(text)
                protocol.encode({"return": table.execute(request.execute, request.arguments)})
                outcome = request.execute
            except QmpError as error:
                outcome = said(error)
        for line in parts[0].decode("utf-8", "replace").splitlines()[:20]:
            if not _FORBIDDEN.search(line.encode()):
                outcome += monitor.execute(line)[:40]
        return NUMBERS.sub("#", outcome)[:160]


def hmp(parts: Parts, rng: random.Random) -> str:
    """Words of the human monitor, as far as they are numbers, sizes and expressions."""
    words = parts[0].decode("utf-8", "replace").split()[:60]
    for word in words:
        for function in (units.parse_size, units.parse_bandwidth, units.parse_duration_ms):
            _allow(function, word, ValueError)
        for name in ("max-bandwidth", "downtime-limit", "x-sterna-verify", "multifd-compression", word):
            _allow(partial(parse_parameter, name), word, QmpError)
        for parse in (dump.parse_expression, dump.DumpFormat.parse):
            _allow(parse, word, ValueError)
    return f"{len(words)} words"


def _allow(function: Callable[[str], object], word: str, allowed: type[Exception]) -> None:
    try:
        function(word)
    except allowed as error:
        said(error)


def qmp_client(parts: Parts, rng: random.Random) -> str:
    """A QMP server that says anything to a client of ours."""
    near, far = socket.socketpair()
    with near, far:
        sender = threading.Thread(target=_send, args=(far, parts[0]), daemon=True)
        sender.start()
        try:
            with QmpClient(near, "server", 2.0) as client:
                for _ in range(3):
                    client.command("query-status")
            return "answers"
        except (QmpError, ConnectionLost) as error:
            return said(error)
        finally:
            near.close()
            sender.join(SECONDS)


TARGETS: dict[str, tuple[str, Run]] = {
    "reader": ("stream", reader),
    "survey": ("stream", surveyed),
    "description": ("description", description),
    "digest-section": ("digest", digest_section),
    "xbzrle": ("delta", delta),
    "packets": ("channel", packets),
    "compression": ("compressed", inflated),
    "destination": ("stream", destination),
    "machine": ("machine", machine),
    "source": ("return", source),
    "return-path": ("return", return_path),
    "answer": ("return", answer),
    "qmp": ("qmp", qmp),
    "qmp-client": ("qmp-server", qmp_client),
    "hmp": ("hmp", hmp),
    "commands": ("qmp", commands),
    "commands-hmp": ("hmp", commands),
}
"""By name: the folder of the corpus, and the function."""


def seeds(corpus: Path, kind: str) -> list[Parts]:
    """The inputs of a kind, in the order of their names."""
    from tests.fuzz.parts import load

    return [load(path) for path in sorted((corpus / kind).iterdir(), key=os.fspath)]
