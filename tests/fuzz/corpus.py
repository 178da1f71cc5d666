"""What the fuzzer starts from: streams, channels and answers of real migrations, and a monitor's lines."""

import shutil
import threading
from io import BytesIO
from pathlib import Path
from unittest.mock import patch

import numpy as np
from tests.fuzz.parts import Parts, load, pack
from tests.migration import pairs
from tests.migration.pairs import TCP, hosts
from tests.monitor.machines import monitored
from tests.savedstream import saved, saving

from sterna.analysis.proxy.proxy import Proxy
from sterna.analysis.survey import survey
from sterna.jit.ahead import fetch_kernels
from sterna.migration import handshake, verify
from sterna.migration.channels.tcp import TcpUri
from sterna.migration.channels.tcp import parse as parse_tcp
from sterna.migration.channels.unix import UnixUri
from sterna.stream.multifd.compression import compressor
from sterna.stream.multifd.format import Compression
from sterna.stream.return_path import ReturnMessage, pong, shut
from sterna.stream.wire import ReturnPathType
from sterna.stream.xbzrle import coding
from sterna.testing.guest import DoubleGuest

PAGES = 6
ENCODINGS = {
    "plain": ({}, {}),
    "xbzrle": ({"xbzrle": True}, {}),
    "multifd": ({"multifd": True}, {"multifd-channels": 2}),
    "zlib": ({"multifd": True}, {"multifd-channels": 2, "multifd-compression": "zlib"}),
    "zstd": ({"multifd": True}, {"multifd-channels": 1, "multifd-compression": "zstd"}),
}
QMP = (
    b'{"execute": "qmp_capabilities", "arguments": {"enable": []}}\r\n{"execute": "query-migrate", "id": 1}\n',
    b'{"execute": "migrate-set-parameters", "arguments": {"max-bandwidth": 1, "downtime-limit": 300}, "id": null}\n',
    b'{"execute": "migrate-set-capabilities", "arguments": {"capabilities": [{"capability": "xbzrle", "state": true}]}}\n',
    b'{"execute": "human-monitor-command", "arguments": {"command-line": "info registers -a", "cpu-index": 0}, "id": [{}]}',
    b'{\n "execute":\n "query-status"\n}  [1, 2, "\\"}"] nonsense\n"text\n{"execute": 5}\n{"a": "\xc3\xa4\\u00e4"}\n',
)
HMP = (
    b"info migrate\ninfo registers -a\ninfo cpus\nhelp info\nx 1\nxp /4xw 0x40000000\nxp/2gx 0x40000000+4*2\n"
    b"migrate_set_parameter max-bandwidth 1g\nmigrate_set_capability xbzrle on\nmigrate_set_parameter downtime-limit 1.5s\n",
    b"stop\ncont\ninfo stage2\ninfo migrate_parameters\ncpu 1\ninfo status\n? migrate\nxp /8cb (0x40000000|3)-1\n",
)
QMP_SERVER = (
    b'{"QMP": {"version": {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "p"}, "capabilities": []}}\r\n'
    b'{"return": {}}\r\n{"timestamp": {"seconds": 1, "microseconds": 2}, "event": "STOP"}\r\n'
    b'{"return": {"status": "running"}}\r\n{"error": {"class": "GenericError", "desc": "no"}}\r\n',
)


def build(directory: Path) -> None:
    """Record everything into `directory`: a folder for each kind, a file for each input."""
    fetch_kernels()
    (directory / "captures").mkdir(parents=True)
    for name, (capabilities, parameters) in ENCODINGS.items():
        # Compiling kernels for the first time may take longer than a test would wait.
        with patch.object(pairs, "TIMEOUT", 300.0):
            record = _record(directory / "captures" / name, capabilities, parameters)
        main = (record / "main.stream").read_bytes()
        channels = [path.read_bytes() for path in sorted(record.glob("channel-*.stream"))]
        _save(directory, "stream", name, [main, *channels])
        if name in ("plain", "multifd"):
            _save(directory, "return", name, [(record / "main.return").read_bytes()])
    _save(directory, "stream", "written", [_written(directory / "written")])
    _save(directory, "machine", "sterna", [_machine(directory)])
    if shutil.which("qemu-system-arm"):
        _record_qemu(directory)
    _save_details(directory)
    for kind, inputs in (("qmp", QMP), ("hmp", HMP), ("qmp-server", QMP_SERVER)):
        for i, data in enumerate(inputs):
            _save(directory, kind, str(i), [data])
    _save(directory, "return", "qemu", [pong(1).encode() + shut(0).encode()])
    request = ReturnMessage(ReturnPathType.REQ_PAGES_ID, bytes(12) + b"\x08toy.rams")
    _save(
        directory,
        "return",
        "postcopy",
        [request.encode() + ReturnMessage(ReturnPathType.REQ_PAGES, bytes(12)).encode()],
    )
    nack = handshake.encode(handshake.Nack("no", "double.ram", 0, bytes(8 * PAGES), "0" * 16))
    hello = handshake.encode(handshake.Hello(handshake.VERSION, list(handshake.FEATURES), "0" * 32, 1))
    refused = (
        ReturnMessage(handshake.PrivateMessage.HELLO, hello).encode() + pong(handshake.GREETING).encode()
    )
    refused += ReturnMessage(handshake.PrivateMessage.NACK, nack).encode()
    _save(directory, "return", "refused", [refused])


def _save(directory: Path, kind: str, name: str, parts: Parts) -> None:
    (directory / kind).mkdir(parents=True, exist_ok=True)
    (directory / kind / name).write_bytes(pack(parts))


def _guest() -> DoubleGuest:
    """A guest with pages of all kinds."""
    guest = DoubleGuest(PAGES, steps_per_ms=1, steps_per_harvest=2)
    rng = np.random.default_rng(1)
    guest.block.data[:8192] = rng.integers(0, 256, 8192, dtype=np.uint8)
    guest.step_until(20)
    return guest


def _record(directory: Path, capabilities: dict[str, bool], parameters: dict[str, object]) -> Path:
    with hosts(_guest(), DoubleGuest(PAGES, running=False)) as (here, there):
        for host in (here, there):
            host.controller.set_capabilities(capabilities)
            host.controller.set_parameters(parameters)
        # Several passes.
        here.controller.set_parameters({"max-bandwidth": 400_000, "downtime-limit": 0})
        address = there.controller.incoming(TCP)
        destination = parse_tcp(address.removeprefix("tcp:"))
        with Proxy(TcpUri("127.0.0.1", 0), destination, record=directory, digests=False) as proxy:
            thread = threading.Thread(target=proxy.run)
            thread.start()
            here.controller.migrate(proxy.uri)
            here.wait_pass(3)
            here.controller.set_parameters({"max-bandwidth": 0, "downtime-limit": 1000})
            info = here.outcome()
            thread.join()
        assert info.status.value == "completed", info
    return directory


def _written(path: Path) -> bytes:
    """A stream in a file, with digests."""
    with hosts(_guest()) as (here,):
        here.controller.set_parameters({"x-sterna-verify": "on"})
        here.migrate(f"file:{path}")
    return path.read_bytes()


def _machine(directory: Path) -> bytes:
    """A stream of a whole machine."""
    path = directory / "machine.stream"
    with monitored(directory / "qmp", append="20 2 5") as running:
        running.machine.cont()
        running.migration.migrate(f"file:{path}")
        assert running.migration.wait(300).status.value == "completed"
    return path.read_bytes()


def _record_qemu(directory: Path) -> None:
    from tests.migration.test_qemu import qemu

    path = directory / "qemu.stream"
    with qemu(directory, "-m", "16") as source:
        source.ask("migrate-set-capabilities", capabilities=[{"capability": "events", "state": True}])
        source.ask("migrate", uri=saving(path))
        source.wait_event("MIGRATION", status="completed")
    _save(directory, "machine", "qemu", [saved(path)])

    record, sockets = directory / "captures" / "qemu", directory / "sockets"
    sockets.mkdir()
    with qemu(sockets, "-m", "16") as source, qemu(sockets, "-m", "16", "-incoming", "defer") as destination:
        for one in (source, destination):
            states = [{"capability": name, "state": True} for name in ("return-path", "multifd")]
            one.ask("migrate-set-capabilities", capabilities=states)
            one.ask("migrate-set-parameters", **{"multifd-channels": 1, "multifd-compression": "zlib"})
        destination.ask("migrate-incoming", uri=f"unix:{sockets}/in")
        with Proxy(
            UnixUri(f"{sockets}/proxy"), UnixUri(f"{sockets}/in"), record=record, digests=False
        ) as proxy:
            thread = threading.Thread(target=proxy.run)
            thread.start()
            source.ask("migrate", uri=proxy.uri)
            thread.join()
    parts = [(record / name).read_bytes() for name in ("main.stream", "channel-0.stream")]
    _save(directory, "stream", "qemu", parts)


def description_of(stream: bytes) -> bytes:
    """The description in a stream that may be damaged: from its opening to its last brace."""
    start = stream.rfind(b'{"page_size"')
    if start < 0:
        start = stream.rfind(b'{"configuration"')
    end = stream.rfind(b"}")
    return stream[start : end + 1] if 0 <= start < end else b"{}"


def _save_details(directory: Path) -> None:
    """Pieces of the streams, for the decoders that see no more than these."""
    for path in sorted((directory / "stream").iterdir()):
        main, *channels = load(path)
        found = survey(BytesIO(main))
        devices = next((section.offset for section in found.sections if not section.is_ram), 0)
        text = description_of(main)
        _save(directory, "description", path.name, [text, main[devices : -len(text)][:20_000]])
        for i, channel in enumerate(channels):
            _save(directory, "channel", f"{path.name}-{i}", [channel[:30_000]])
    written = load(directory / "stream" / "written")[0]
    digest = next(s for s in survey(BytesIO(written)).sections if s.header.name == verify.SECTION.name)
    body = digest.offset + 1 + 4 + 1 + len(verify.SECTION.name) + 8
    _save(directory, "digest", "written", [written[body : body + digest.bytes]])
    rng = np.random.default_rng(2)
    for i in range(6):
        old = rng.integers(0, 256, 4096, dtype=np.uint8)
        new, out = old.copy(), np.empty(4096, dtype=np.uint8)
        new[rng.integers(0, 4096, 1 << 2 * i)] ^= 1
        size = coding.encode(old.view(np.uint64), new.view(np.uint64), out)
        _save(directory, "delta", str(i), [out[: max(size, 0)].tobytes()])
    for compression, level in (
        (Compression.ZLIB, 1),
        (Compression.ZLIB, 0),
        (Compression.ZSTD, 1),
        (Compression.ZSTD, 19),
    ):
        coder = compressor(compression, level)
        for size in (4096, 1 << 20):
            data = coder(b"sterna" * 100 + bytes(size - 600))
            _save(directory, "compressed", f"{compression.value}-{level}-{size}", [data])
