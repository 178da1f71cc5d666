"""The committed images are what the sources give, and are laid out as the loader and the host expect."""

import shutil
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from sterna.guests import BOARDS, PROGRAMS, GuestError, find
from sterna.guests.build import COMPILER_FILE, SOURCES, BuildError, build, build_all, compiler_version
from sterna.guests.catalog import IMAGES
from sterna.guests.layout import STATUS_MAGIC, STATUS_OFFSET, WORK_OFFSET

ALL = pytest.mark.parametrize(
    ("program", "board"), [(program, board) for program in PROGRAMS for board in BOARDS]
)


@pytest.mark.slow
def test_images_are_what_the_sources_give(tmp_path: Path) -> None:
    committed = (IMAGES / COMPILER_FILE).read_text()
    assert committed == f"ziglang {compiler_version()}\n", (
        "the images are made by the version that pyproject.toml pins"
    )
    images = build_all(tmp_path)
    assert {image.name for image in images} == {path.name for path in IMAGES.glob("*.elf")}
    for image in images:
        assert image.read_bytes() == (IMAGES / image.name).read_bytes(), f"{image.name}: run make guests"


@pytest.mark.slow
def test_the_place_of_the_sources_does_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = build("random", "virt", tmp_path).read_bytes()
    elsewhere = tmp_path / "a folder with spaces"
    shutil.copytree(SOURCES, elsewhere)
    monkeypatch.setattr("sterna.guests.build.SOURCES", elsewhere)
    assert build("random", "virt", elsewhere).read_bytes() == here


@pytest.mark.slow
def test_a_source_that_does_not_compile_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "src"
    shutil.copytree(SOURCES, broken)
    (broken / "clock.c").write_text("int broken = ;\n")
    monkeypatch.setattr("sterna.guests.build.SOURCES", broken)
    with pytest.raises(BuildError, match=r"clock\.c:1"):
        build("clock", "virt", tmp_path)


@ALL
def test_layout_of_the_images(program: str, board: str) -> None:
    base = {"virt": 0x40000000, "vexpress-a15": 0x80000000}.get(board, 0x40000000)
    machine = {"pc-min": "EM_X86_64", "virt-arm64": "EM_AARCH64"}.get(board, "EM_ARM")
    path = find(program, board)
    with path.open("rb") as file:
        elf = ELFFile(file)
        assert (elf["e_machine"], elf["e_type"], elf.little_endian) == (machine, "ET_EXEC", True)
        (segment,) = [s for s in elf.iter_segments() if s["p_type"] == "PT_LOAD"]
        assert elf["e_entry"] == base + STATUS_OFFSET + 4096
        assert segment["p_paddr"] == segment["p_vaddr"] == base + STATUS_OFFSET
        assert segment["p_paddr"] + segment["p_memsz"] <= base + WORK_OFFSET
        assert segment.data()[:8] == STATUS_MAGIC.to_bytes(8, "little")
        assert elf.get_section_by_name(".symtab") is None


def test_programs_and_boards_that_do_not_exist() -> None:
    with pytest.raises(GuestError, match="no guest program 'dirtyrom'; there are: dirtyram, clock, random"):
        find("dirtyrom", "virt")
    with pytest.raises(GuestError, match="no guest programs for board 'raspi2b'; there are some for: virt"):
        find("clock", "raspi2b")
