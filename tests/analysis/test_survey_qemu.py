"""Surveys of streams that a real QEMU wrote."""

import subprocess
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from tests.savedstream import saved, saving
from tests.stream.streams import PieceSource

from sterna.analysis.capture import survey_file
from sterna.analysis.compare import compare
from sterna.analysis.findings import SectionSurvey
from sterna.analysis.survey import survey
from sterna.stream.description import find_description

pytestmark = pytest.mark.qemu

RAM_BYTES = 16 << 20
SECONDS = 300


def record(qemu: str, path: Path, machine: str, *options: str) -> Path:
    """Have a stopped guest written to `path`."""
    command = f"-M {machine} -cpu cortex-a15 -m 16 -S -nodefaults -display none -monitor stdio".split()
    done = subprocess.run(
        [qemu, *command, *options],
        input=f'migrate "{saving(path)}"\nquit\n',
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert not done.returncode, done.stdout + done.stderr
    saved(path)
    return path


@pytest.mark.parametrize(
    ("machine", "ram", "page_bytes"),
    [("virt", "mach-virt.ram", 4096), ("vexpress-a15", "vexpress.highmem", 1024)],
)
def test_all_of_qemus_streams_is_understood(
    qemu: str, tmp_path: Path, machine: str, ram: str, page_bytes: int
) -> None:
    path = record(qemu, tmp_path / "stream", machine)
    found = survey_file(path, page_digests=True)
    assert found.flaw() is None, found.flaw()
    assert 1 << found.page_bits == page_bytes
    assert found.described
    assert sum(asdict(found.kinds).values()) == found.bytes == path.stat().st_size
    sizes = {block.name: block.bytes for block in found.blocks}
    assert sizes[ram] == RAM_BYTES
    devices = {str(section.header): section for section in found.sections if not section.is_ram}
    assert {"cpu", "arm_gic", "pl011", "globalstate"} <= set(devices)
    assert all(section.state is not None for section in devices.values())
    cpu = devices["cpu"].state
    assert cpu is not None
    assert len(cpu.fields["env.regs"]) == 16
    # A stopped guest dirties nothing.
    assert len(found.passes) == 1
    assert found.passes[0].normal + found.passes[0].zero == sum(block.pages for block in found.blocks)


def test_with_and_without_the_description_beforehand(qemu: str, tmp_path: Path) -> None:
    stream = record(qemu, tmp_path / "stream", "virt,dtb-randomness=off").read_bytes()
    known = survey(PieceSource(stream), description=find_description(stream), page_digests=True)
    searched = survey(PieceSource(stream), page_digests=True)
    assert known == searched
    # QEMU can be asked to leave the description out; the devices are told apart all the same.
    bare = record(qemu, tmp_path / "bare", "virt,suppress-vmdesc=on").read_bytes()
    found = survey(PieceSource(bare), page_digests=True)
    assert found.flaw() is None
    assert not found.described

    def without_content(section: SectionSurvey) -> SectionSurvey:
        # In how many parts RAM is sent depends on how busy the host is.
        parts = replace(section, offset=0, state=None, digest=0)
        return replace(parts, parts=1, bytes=0) if section.is_ram else parts

    assert list(map(without_content, found.sections)) == list(map(without_content, known.sections))


def test_two_guests_that_differ(qemu: str, tmp_path: Path) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"sterna" * 1000)
    plain = survey_file(record(qemu, tmp_path / "plain", "virt,dtb-randomness=off"), page_digests=True)
    again = survey_file(record(qemu, tmp_path / "again", "virt,dtb-randomness=off"), page_digests=True)
    loader = f"loader,file={content},addr=0x40400ffc,force-raw=on"
    loaded = survey_file(
        record(qemu, tmp_path / "loaded", "virt,dtb-randomness=off", "-device", loader), page_digests=True
    )
    [difference] = compare(plain, loaded).blocks
    assert (difference.block, difference.ranges) == ("mach-virt.ram", ((0x400, 0x402),))
    # Not even QEMU's own clock runs while a guest is stopped from the start, but its real-time clock does.
    fields = {(one.section, one.field.partition("[")[0]) for one in compare(plain, again).fields}
    assert {section for section, _ in fields} <= {"timer", "pl031"}
    assert compare(plain, again).blocks == ()


def test_cuts_and_changes(qemu: str, tmp_path: Path) -> None:
    stream = record(qemu, tmp_path / "stream", "virt,dtb-randomness=off").read_bytes()
    text = find_description(stream)
    assert text is not None
    end = len(stream) - len(text) - 5
    for cut in (1, 8, 20, 100, 5000, end // 2, end - 1, end - 300, end + 1, len(stream) - 1):
        flaw = survey(PieceSource(stream[:cut])).flaw()
        assert flaw is not None
        assert flaw.offset == cut, flaw.text
    devices = survey(PieceSource(stream), description=text).sections[1].offset
    for at in range(devices, end, 101):
        changed = bytearray(stream)
        changed[at] ^= 0xFF
        for known in (text, None):
            found = survey(PieceSource(bytes(changed)), description=known)
            assert found.fault is not None or found.bytes == len(stream)
