"""How the emulated arm64 host is put together. Booting it: tests/arm64."""

import io
import re
import stat
from pathlib import Path

import pytest

from sterna.cli.errors import ExitCode
from sterna.testbed.armhost import image
from sterna.testbed.armhost.emulator import _write_job
from sterna.testbed.armhost.errors import ArmHostError
from sterna.testbed.armhost.recipe import Recipe, recipe_for
from sterna.testbed.debian import cpio
from sterna.testbed.debian.cache import digest_of
from sterna.testbed.debian.cpio import Entry
from sterna.testbed.debian.errors import ImageError
from sterna.testbed.debian.kernelmodules import load_order

ROOT = Path(__file__).parent.parent.parent


def read_cpio(data: bytes) -> dict[str, tuple[int, bytes]]:
    """Mode and content by path, read as the format's description says."""
    found, at = {}, 0
    while True:
        assert data[at : at + 6] == b"070701"
        numbers = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name = data[at + 110 : at + 110 + numbers[11]]
        assert name.endswith(b"\0")
        content = at + (110 + len(name) + 3) // 4 * 4
        if name == b"TRAILER!!!\0":
            return found
        found[name[:-1].decode()] = numbers[1], data[content : content + numbers[6]]
        at = content + (numbers[6] + 3) // 4 * 4


def test_archives_hold_what_was_put_in_and_the_folders_above() -> None:
    out = io.BytesIO()
    cpio.write(
        out,
        {"usr/bin/x": Entry.file(b"#!", 0o755), "usr/y": Entry.link("bin/x"), "z": Entry.file(b"12345")},
        mtime=7,
    )
    found = read_cpio(out.getvalue())
    assert found["usr/bin/x"] == (stat.S_IFREG | 0o755, b"#!")
    assert found["usr/y"] == (stat.S_IFLNK | 0o777, b"bin/x")
    assert found["z"][1] == b"12345"
    assert stat.S_ISDIR(found["usr"][0])
    assert stat.S_ISDIR(found["usr/bin"][0])
    assert list(found) == sorted(found), "a folder comes before what is in it"


def test_the_same_entries_make_the_same_archive() -> None:
    first, second = io.BytesIO(), io.BytesIO()
    cpio.write(first, {"a": Entry.file(b"1"), "b": Entry.file(b"2")}, mtime=1)
    cpio.write(second, {"b": Entry.file(b"2"), "a": Entry.file(b"1")}, mtime=1)
    assert first.getvalue() == second.getvalue()


def test_modules_load_after_those_they_need(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"net": ["failover"], "failover": [], "disk": [], "loop": ["pool"], "pool": ["loop"]}
    monkeypatch.setattr(
        "sterna.testbed.debian.kernelmodules._depends", lambda content: needs[content.decode()]
    )
    modules = {f"lib/{name}.ko": name.encode() for name in needs}
    assert load_order(modules, ["net", "built_in", "disk"]) == [
        "lib/failover.ko",
        "lib/net.ko",
        "lib/disk.ko",
    ]
    with pytest.raises(ImageError, match="loop -> pool -> loop"):
        load_order(modules, ["loop"])


def test_the_host_has_what_sterna_needs_but_for_emulation(tmp_path: Path) -> None:
    packages = recipe_for(ROOT).python_packages
    names = {re.split("[>=<]", text)[0] for text in packages}
    assert {"click", "numpy", "pytest", "xxhash", "backports.zstd"} <= names
    assert not names & {"numba", "unicorn", "ziglang"}
    assert not [text for text in packages if ";" in text]
    with pytest.raises(ArmHostError, match="no checkout of sterna"):
        recipe_for(tmp_path)


def test_an_image_that_is_there_needs_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sterna-armhost" / "0123456789abcdef"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text('{"packages": ["python3_1_arm64.deb"]}')
    pointer = folder.parent / f"stable-{digest_of(Recipe(()), image._MAKERS)}"
    pointer.write_text(folder.name)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert image.obtain(Recipe(())).packages == ["python3_1_arm64.deb"]
    with pytest.raises(ArmHostError, match="qemu-system-aarch64 is missing: apt install qemu-system-arm"):
        image.obtain(Recipe(()), update=True)


def test_the_job_holds_the_tree_without_what_the_host_cannot_use(tmp_path: Path) -> None:
    import tarfile

    tree = tmp_path / "tree"
    for name in (
        *("src/a.py", ".git/HEAD", "a b/c"),
        *("src/__pycache__/a.cpython-311.pyc", "src/__pycache__/a.cpython-39.pyc", "src/__pycache__/a.nbi"),
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    _write_job(tmp_path / "job.tar", ["echo", "it's here"], tree)
    with tarfile.open(tmp_path / "job.tar") as job:
        names = {member.name for member in job if member.isfile()}
        command = job.extractfile("command")
        assert command is not None
        assert command.read() == b"echo 'it'\"'\"'s here'\n"
    assert names == {
        "command",
        "tree/src/a.py",
        "tree/a b/c",
        "tree/src/__pycache__/a.cpython-311.pyc",
    }


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--forward", "80", "--", "true"], "write two ports"),
        (["--forward", "80:70000", "--", "true"], "write two ports"),
        (["--memory", "much", "--", "true"], "is not a size"),
    ],
)
def test_wrong_calls(arguments: list[str], complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    from sterna.cli import main

    with pytest.raises(SystemExit) as left:
        main(["testbed", "host", "arm64", *arguments])
    assert left.value.code == ExitCode.USAGE
    assert complaint in capfd.readouterr().err
