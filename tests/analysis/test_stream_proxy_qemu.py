"""The proxy between two QEMUs: a running guest moves, and the digest is that of the destination's memory."""

import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.migration.test_qemu import RAM, Qemu, qemu
from tests.stream.test_qemu_streams import BOARDS
from tests.stream.test_xbzrle_qemu import PAGES, SLOW, Debugger, disturb, disturb_passes

from sterna.analysis.capture import survey_file
from sterna.analysis.findings import StreamSurvey
from sterna.analysis.proxy.connection import ConnectionKind
from sterna.analysis.proxy.outcome import ProxyOutcome
from sterna.analysis.proxy.proxy import Proxy
from sterna.analysis.proxy.view import ProxyView
from sterna.guests import catalog
from sterna.guests.layout import STATUS_BYTES, STATUS_OFFSET, DirtyramWord, StatusError, read_status
from sterna.memory.digest import BlockDigest, digest_file
from sterna.migration.channels.unix import UnixUri

pytestmark = pytest.mark.qemu

MEMORY = 32 << 20
BLOCK = "mach-virt.ram"
GUEST = ["-m", "32", "-kernel", str(catalog.find("dirtyram", "virt")), "-append", "1500 30 2"]
SECONDS = 300


@contextmanager
def two_stopped_qemus(
    path: Path, *options: str, settings: dict[str, Any], **capabilities: bool
) -> Iterator[tuple[Qemu, Qemu]]:
    """A guest that stands still, and a QEMU that waits for it and does not let it go on.

    :param options: of the first
    """
    states = [{"capability": name.replace("_", "-"), "state": on} for name, on in capabilities.items()]
    states.append({"capability": "events", "state": True})
    with qemu(path, *GUEST, *options) as source, qemu(path, *GUEST, "-incoming", "defer") as destination:
        for one in (source, destination):
            one.ask("migrate-set-capabilities", capabilities=states)
            if settings:
                one.ask("migrate-set-parameters", **settings)
        destination.ask("migrate-incoming", uri=f"unix:{path}/destination")
        yield source, destination


@contextmanager
def two_qemus(path: Path, *, settings: dict[str, Any], **capabilities: bool) -> Iterator[tuple[Qemu, Qemu]]:
    """As `two_stopped_qemus`; the guest runs, and writes to memory."""
    with two_stopped_qemus(path, settings=settings, **capabilities) as (source, destination):
        source.ask("cont")
        # A guest that has not come to its work yet is moved in one pass.
        while not wrote_all(path, source):
            pass
        yield source, destination


def wrote_all(path: Path, source: Qemu) -> bool:
    """Whether the guest has written each of its pages once. A look is a request, so to ask again does not spin for nothing."""
    source.ask("pmemsave", val=RAM + STATUS_OFFSET, size=STATUS_BYTES, filename=f"{path}/status")
    try:
        status = read_status((path / "status").read_bytes())
    except StatusError:
        return False
    return status.cpus > 0 and status.word(0, DirtyramWord.PASSES) > 0


def wait_pass(source: Qemu, number: int) -> None:
    """Passes are counted by QEMU; each look is a request, so this does not spin for nothing."""
    while (state := source.ask("query-migrate")).get("ram", {}).get("dirty-sync-count", 0) < number:
        assert state["status"] in ("setup", "active"), state


def wait_forwarded(proxy: Proxy, source: Qemu, size: int) -> None:
    """So much has gone through: both ends are there, and the stream is in the midst of its pages."""
    while proxy.view().forwarded < size:
        assert (state := source.ask("query-migrate"))["status"] in ("setup", "active"), state


def migrate(path: Path, source: Qemu, bandwidth: int, wait_passes: Callable[[], None]) -> ProxyView:
    """Migrate through a proxy, slowly until some passes have been made."""
    source.ask("migrate-set-parameters", **{"max-bandwidth": bandwidth, "downtime-limit": 1})
    listen, destination = UnixUri(f"{path}/proxy"), UnixUri(f"{path}/destination")
    with Proxy(listen, destination, record=path / "record") as proxy:
        with forwarding(proxy):
            source.ask("migrate", uri=proxy.uri)
            wait_passes()
            source.ask("migrate-set-parameters", **{"max-bandwidth": 1 << 40, "downtime-limit": 2000})
        return proxy.view()


@contextmanager
def forwarding(proxy: Proxy) -> Iterator[None]:
    """The proxy forwards in a thread, and at the end has done so; cut off when the body fails."""
    thread = threading.Thread(target=proxy.run, daemon=True)
    thread.start()
    try:
        yield
        thread.join(SECONDS)
        assert not thread.is_alive(), proxy.view()
    finally:
        while thread.is_alive():
            proxy.interrupt()
            thread.join(1)


def memory(path: Path, destination: Qemu) -> BlockDigest:
    """The digest of the destination's memory, by QEMU's own copy of it."""
    assert destination.ask("query-status")["status"] == "paused"
    destination.ask("pmemsave", val=RAM, size=MEMORY, filename=f"{path}/memory")
    with (path / "memory").open("rb") as file:
        return digest_file(BLOCK, file)


@pytest.mark.parametrize(
    ("capabilities", "settings"),
    [
        ({}, {}),
        ({"return_path": True}, {}),
        ({"return_path": True, "multifd": True}, {"multifd-channels": 3}),
        ({"multifd": True}, {"multifd-channels": 2, "multifd-compression": "zlib"}),
        ({"return_path": True, "multifd": True}, {"multifd-channels": 4, "multifd-compression": "zstd"}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "none",
)
def test_the_digest_is_that_of_the_destination(
    tmp_path: Path, capabilities: dict[str, bool], settings: dict[str, Any]
) -> None:
    with two_qemus(tmp_path, settings=settings, **capabilities) as (source, destination):
        view = migrate(tmp_path, source, 12 << 20, lambda: wait_pass(source, 4))
        theirs = memory(tmp_path, destination)
    survey = check(tmp_path, view, theirs, asked="return_path" in capabilities)
    kinds = [one.kind for one in view.connections]
    assert kinds.count(ConnectionKind.CHANNEL) == len(survey.channels) == settings.get("multifd-channels", 0)
    assert {one.compression for one in survey.channels} <= {settings.get("multifd-compression", "none")}


def test_changes_are_those_of_the_destination(tmp_path: Path) -> None:
    """The guest stands still, and its debugger writes its memory: of one that runs, next to nothing is left once only changes are
    sent, and nothing on a busy host.
    """
    rng = np.random.default_rng(6)
    debugging = ("-gdb", f"unix:{tmp_path}/gdb,server=on,wait=off")
    with two_stopped_qemus(tmp_path, *debugging, settings={}, return_path=True, xbzrle=True) as (
        source,
        destination,
    ):
        for command in ("cont", "stop"):  # what never ran does not arrive as paused
            source.ask(command)
        # Later than that: a debugger that is there is told of a stop.
        with closing(Debugger(tmp_path / "gdb")) as debugger:
            for number in range(PAGES):
                disturb(debugger, BOARDS[0], rng, number)
            view = migrate(
                tmp_path, source, SLOW, lambda: disturb_passes(source.ask, debugger, BOARDS[0], rng)
            )
            theirs = memory(tmp_path, destination)
    assert check(tmp_path, view, theirs, asked=True).kinds.changes > 0


def check(path: Path, view: ProxyView, theirs: BlockDigest, *, asked: bool) -> StreamSurvey:
    """What holds of each migration.

    :param asked: whether the source has asked for a return path
    """
    survey = view.survey
    assert survey is not None
    assert survey.flaw() is None, survey.flaw()
    assert survey.digest is not None
    [ours] = (block for block in survey.digest.blocks if block.block == BLOCK)
    assert ours.hex == theirs.hex
    assert (ours.chunks == theirs.chunks).all()
    assert view.verdict.outcome is (ProxyOutcome.COMPLETED if asked else ProxyOutcome.UNCONFIRMED)
    assert view.answers.counts == ({"PONG": 1, "SHUT": 1} if asked else {})
    assert len(survey.passes) >= 3
    assert survey.total_bytes == view.forwarded
    devices = {str(section.header): section for section in survey.sections if not section.is_ram}
    assert devices["cpu"].state is not None
    assert len(devices["cpu"].state.fields["env.regs"]) == 16
    assert [one.kind for one in view.connections].count(ConnectionKind.MAIN) == 1
    recorded = survey_file(path / "record", digests=True)
    assert recorded.flaw() is None
    assert recorded.digest is not None
    assert recorded.digest.hex == survey.digest.hex
    return survey


def test_the_destination_dies(tmp_path: Path) -> None:
    with two_qemus(tmp_path, settings={}, return_path=True) as (source, destination):
        source.ask("migrate-set-parameters", **{"max-bandwidth": 4 << 20})
        with Proxy(UnixUri(f"{tmp_path}/proxy"), UnixUri(f"{tmp_path}/destination")) as proxy:
            with forwarding(proxy):
                source.ask("migrate", uri=proxy.uri)
                wait_forwarded(proxy, source, 1 << 20)
                destination.kill()
            view = proxy.view()
        source.wait_event("MIGRATION", status="failed")
        assert source.ask("query-status")["running"]
    assert view.verdict.outcome is ProxyOutcome.FAILED
    assert "the connection to the destination broke" in view.verdict.reason or "closed" in view.verdict.reason


def test_cancelled_at_the_source(tmp_path: Path) -> None:
    with two_qemus(tmp_path, settings={"multifd-channels": 2}, multifd=True) as (source, _):
        source.ask("migrate-set-parameters", **{"max-bandwidth": 4 << 20})
        with Proxy(UnixUri(f"{tmp_path}/proxy"), UnixUri(f"{tmp_path}/destination")) as proxy:
            with forwarding(proxy):
                source.ask("migrate", uri=proxy.uri)
                wait_forwarded(proxy, source, 1 << 20)
                source.ask("migrate_cancel")
            view = proxy.view()
        source.wait_event("MIGRATION", status="cancelled")
    assert view.verdict.outcome is ProxyOutcome.FAILED, view.verdict
