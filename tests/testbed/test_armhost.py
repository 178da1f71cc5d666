"""How the emulated arm64 host is put together. Booting it: tests/arm64."""

import io
import lzma
import os
import pty
import re
import select
import shutil
import signal
import stat
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from tests.cli.vms import children, wait_for
from tests.ports import held_port

from sterna.cli.errors import ExitCode
from sterna.testbed.armhost import image
from sterna.testbed.armhost.emulator import PROGRAM, _write_job
from sterna.testbed.armhost.packages import Packages
from sterna.testbed.armhost.recipe import KERNELS, Recipe, recipe_for
from sterna.testbed.debian import cpio
from sterna.testbed.debian.apt import Apt
from sterna.testbed.debian.cache import Cache, digest_of
from sterna.testbed.debian.cpio import Entry
from sterna.testbed.debian.kernelmodules import load_order
from sterna.testbed.errors import ImageError

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
    with pytest.raises(ImageError, match="no checkout of sterna"):
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
    with pytest.raises(ImageError, match="qemu-system-aarch64 is missing: apt install qemu-system-arm"):
        image.obtain(Recipe(()), update=True)


class Enough(Exception):
    """Ends a wait."""


def test_who_waits_for_another_that_builds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    told = []

    def progress(text: str) -> None:
        told.append(text)
        raise Enough

    with Cache.named("sterna-armhost").locked(progress), pytest.raises(Enough):
        image.obtain(Recipe(()), progress=progress)
    assert told == [f"another process builds images in {tmp_path}/sterna-armhost: waiting for it"]


ON_A_TERMINAL = """
import signal, sys
from pathlib import Path
from sterna.cli import main
from sterna.testbed.armhost import image
signal.signal(signal.SIGTERM, signal.SIG_DFL)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
image.obtain = lambda *_, **__: image.Image(Path(sys.argv[1]))
main(["testbed", "host", "arm64", "--smp", "1", "--memory", "512M", "--tree", sys.argv[1]])
"""


@pytest.mark.qemu
@pytest.mark.skipif(shutil.which(PROGRAM) is None, reason=f"needs {PROGRAM}")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_a_shell_that_is_ended_leaves_no_qemu(number: signal.Signals, tmp_path: Path) -> None:
    built, temporary = tmp_path / "built", tmp_path / "temporary"
    built.mkdir()
    temporary.mkdir()
    shutil.copy(ROOT / "pyproject.toml", built)
    for name in ("kernel", "initramfs"):  # it runs, and nothing comes of it
        (built / name).write_bytes(bytes(4096))
    ours, theirs = pty.openpty()
    with open(ours, "rb"), open(theirs, "rb") as terminal:
        before = termios.tcgetattr(terminal)
        process = subprocess.Popen(
            [sys.executable, "-c", ON_A_TERMINAL, str(built)],
            stdin=terminal,
            stdout=terminal,
            stderr=subprocess.PIPE,
            env=os.environ | {"TMPDIR": str(temporary)},
        )
        with process:
            assert process.stderr is not None
            wait_for(lambda: process.poll() is not None or children(process.pid))
            [child] = children(process.pid)
            end = os.pidfd_open(child)
            wait_for(lambda: termios.tcgetattr(terminal) != before)  # QEMU has it now
            process.send_signal(number)
            said = process.stderr.read()
            assert select.select([end], [], [], 300)[0], "QEMU goes on"
            os.close(end)
        after = termios.tcgetattr(terminal)
    if number is not signal.SIGKILL:
        assert after == before
        assert (said.strip(), process.returncode) == (b"sterna: error: interrupted", ExitCode.INTERRUPTED)
        assert list(temporary.iterdir()) == []


MODULE = b"\x7fELF\2\1\1".ljust(64, b"\0")
"""An object of no sections."""


def make_deb(path: Path, files: dict[str, bytes]) -> Path:
    content = path.with_suffix("")
    control = (
        f"Package: {content.name}\nVersion: 1\nArchitecture: arm64\nMaintainer: x <x@x>\nDescription: x\n"
    )
    for name, data in {"DEBIAN/control": control.encode(), **files}.items():
        (content / name).parent.mkdir(parents=True, exist_ok=True)
        (content / name).write_bytes(data)
    (content / "DEBIAN").chmod(0o755)  # dpkg-deb refuses what a umask of 077 leaves
    subprocess.run(["dpkg-deb", "--build", "-Zgzip", content, path], check=True, capture_output=True)
    return path


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb")
def test_hosts_of_both_kernels_have_one_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fetched = []

    def fetch(python_packages: tuple[str, ...], _directory: Path) -> Packages:
        fetched.append(python_packages)
        return Packages((make_deb(tmp_path / "common.deb", {"usr/bin/tool": b"tool"}),), ())

    def fetch_kernel(kernel: str, _directory: Path) -> Path:
        # Stable kernels have plain modules, later ones compressed.
        module = lzma.compress(MODULE) if kernel == "backports" else MODULE
        path = f"lib/modules/{kernel}/virtio_blk.ko" + ".xz" * (kernel == "backports")
        files = {f"boot/vmlinuz-{kernel}": f"kernel {kernel}".encode(), path: module}
        return make_deb(tmp_path / f"linux-image-{kernel}.deb", files)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(image, "fetch", fetch)
    monkeypatch.setattr(image, "fetch_kernel", fetch_kernel)
    monkeypatch.setattr(image.emulator, "require_qemu", lambda: "")
    monkeypatch.setattr(image.bytecode, "same_python", lambda: True)
    images = {kernel: image.obtain(Recipe((), kernel)) for kernel in KERNELS}
    assert len(fetched) == 1
    heads = set()
    for kernel, built in images.items():
        assert built.kernel.read_bytes() == f"kernel {kernel}".encode()
        assert built.packages == ["common.deb", f"linux-image-{kernel}.deb"]
        data = built.initramfs.read_bytes()
        root, trailer, rest = data.partition(b"TRAILER!!!\0")
        heads.add(root)
        assert read_cpio(root + trailer)["usr/bin/tool"][1] == b"tool"
        added = read_cpio(rest[rest.index(b"070701") :])
        module = f"usr/lib/modules/{kernel}/virtio_blk.ko"
        assert added[module][1] == MODULE
        assert added["etc/sterna/modules"][1].decode() == f"/{module}\n"
    assert len(heads) == 1
    assert image.obtain(Recipe((), "stable"), update=True) == images["stable"], "the same packages"
    assert len(fetched) == 2


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_a_mirror_that_does_not_answer_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is what it has said before."""
    monkeypatch.setattr("sterna.testbed.debian.apt._KEYRING", tmp_path)
    (tmp_path / "apt.conf").write_text('Acquire::Retries::Delay "false";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    with held_port() as port:
        monkeypatch.setenv("STERNA_DEBIAN_MIRROR", f"http://127.0.0.1:{port}/debian")
        with pytest.raises(ImageError, match=r"apt-get failed \(bookworm-backports, arm64\)"):
            Apt(tmp_path / "apt", "arm64", KERNELS["backports"])


def test_the_job_holds_the_tree_without_what_the_host_cannot_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor what another program has there for a moment."""
    import tarfile

    tree = tmp_path / "tree"
    for name in (
        *("src/a.py", ".git/HEAD", "a b/c", ".versions/a.py"),
        *("src/__pycache__/a.cpython-311.pyc", "src/__pycache__/a.cpython-39.pyc"),
        "src/__pycache__/a.cpython-311.pyc.1234",
    ):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(name)
    (tree / "a b" / "link").symlink_to("c")
    listdir = os.listdir
    with monkeypatch.context() as patch:
        patch.setattr(os, "listdir", lambda path: [*listdir(path), "gone"])
        _write_job(tmp_path / "job.tar", ["echo", "it's here"], tree)
    with tarfile.open(tmp_path / "job.tar") as job:
        names = {member.name for member in job if member.isfile()}
        command = job.extractfile("command")
        assert command is not None
        assert command.read() == b"echo 'it'\"'\"'s here'\n"
        assert job.getmember("tree/a b/link").linkname == "c"
        assert job.getmember("tree/a b/c").mode & 0o777 == (tree / "a b/c").stat().st_mode & 0o777
    assert names == {
        "command",
        "tree/src/a.py",
        "tree/a b/c",
        "tree/src/__pycache__/a.cpython-311.pyc",
    }


def test_the_job_of_a_package_has_it_where_a_checkout_would(tmp_path: Path) -> None:
    import tarfile

    package = tmp_path / "sterna"
    (package / "cli").mkdir(parents=True)
    for name in ("__init__.py", "cli/__init__.py"):
        (package / name).touch()
    (tmp_path / "other.py").touch()
    _write_job(tmp_path / "job.tar", ["true"], package)
    with tarfile.open(tmp_path / "job.tar") as job:
        names = {member.name for member in job if member.isfile()}
    assert names == {"command", "tree/src/sterna/__init__.py", "tree/src/sterna/cli/__init__.py"}


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--forward", "80", "--", "true"], "write two ports"),
        (["--forward", "80:70000", "--", "true"], "write two ports"),
        (
            ["--forward", "80:81", "--forward", "80:82", "--", "true"],
            "--forward: port 80 here is given twice",
        ),
        (["--memory", "much", "--", "true"], "is not a size"),
        (["--memory", "1", "--", "true"], "--memory: 1 MiB are too few"),
        (["--memory", "511.9M", "--", "true"], "--memory: 511 MiB are too few"),
        (["--memory", "4096G", "--", "true"], "--memory: 4194304 MiB is more than the"),
    ],
)
def test_wrong_calls(arguments: list[str], complaint: str, capfd: pytest.CaptureFixture[str]) -> None:
    from sterna.cli import main

    with pytest.raises(SystemExit) as left:
        main(["testbed", "host", "arm64", *arguments])
    assert left.value.code == ExitCode.USAGE
    assert complaint in capfd.readouterr().err
