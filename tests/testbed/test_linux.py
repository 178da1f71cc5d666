"""QEMU with ARM Linux: its images are reproducible, it boots from NFS and migrates, and what is missing or broken is told."""

import base64
import contextlib
import hashlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.vms import alive, children, wait_for

from sterna.guests.layout import WORK_OFFSET, DirtyramWord
from sterna.launch.errors import Unsupported, VmError
from sterna.testbed.bed import Bed, ScenarioContext
from sterna.testbed.checks.network import PingCheck
from sterna.testbed.debian.cpio import Entry
from sterna.testbed.errors import BedError, ImageError
from sterna.testbed.evidence import Evidence
from sterna.testbed.kind import KindOptions
from sterna.testbed.kinds import qemu_linux
from sterna.testbed.kinds.qemu_linux import QemuLinuxKind, copy_sparse
from sterna.testbed.linuxguest import image
from sterna.testbed.linuxguest.ext4 import make_ext4
from sterna.testbed.linuxguest.guest import LinuxGuest
from sterna.testbed.linuxguest.image import LinuxImage
from sterna.testbed.linuxguest.keys import HOST, Keys, to_dropbear
from sterna.testbed.linuxguest.recipe import DISK_BYTES
from sterna.testbed.network import LoopbackNetwork
from sterna.testbed.nfs import NfsServer
from sterna.testbed.procedures.failover import Failover
from sterna.testbed.procedures.ssh import Ssh
from sterna.testbed.settings import MigrationSettings, VmSettings

GUEST = VmSettings(memory="128M", smp=2, program="dirtyram", arguments="2000 50 10")


def unsupported(error: BedError) -> None:
    """Skip; or fail where all is installed."""
    if os.environ.get("STERNA_REQUIRE_LINUX") == "1":
        pytest.fail(f"{error}, and STERNA_REQUIRE_LINUX=1")
    pytest.skip(f"no Linux guest: {error}")


@pytest.fixture(scope="module")
def linux() -> QemuLinuxKind:
    """The kind, its images built where there are none yet."""
    found = QemuLinuxKind()
    try:
        found.check()
    except (Unsupported, ImageError) as error:
        unsupported(error)
    return found


@pytest.fixture
def bed(linux: QemuLinuxKind, root: None) -> Iterator[Bed]:
    with Bed(linux, 0) as made:
        yield made


# -- images ---------------------------------------------------------------------------------------------------


def test_the_same_packages_and_keys_make_the_same_bytes(linux: QemuLinuxKind, tmp_path: Path) -> None:
    built = linux.image
    archives = built.folder.parent / "packages/archives"
    packages = [archives / name for name in built.packages if name.endswith(".deb")]
    if not all(path.exists() for path in packages):
        pytest.skip("the packages are no longer in the cache")
    [kernel] = [path for path in packages if path.name.startswith("linux-image")]
    others = tuple(sorted(path for path in packages if path != kernel))
    image.build(tmp_path, kernel, others, built.keys)
    for name in (image.KERNEL, image.INITRAMFS, image.ROOT):
        assert digest(tmp_path / name) == digest(built.folder / name), name


def test_a_changed_recipe_is_another_image(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(image, "Apt", NoNetwork)
    with pytest.raises(ImageError, match="asked for packages"):
        image.obtain()
    folder = tmp_path / "sterna-linux" / "0123456789abcdef"
    folder.mkdir()
    (folder / "manifest.json").write_text('{"packages": []}')
    pointer = f"armhf-{image.digest_of(DISK_BYTES, image._makers())}"
    (folder.parent / pointer).write_text(folder.name)
    assert image.obtain().folder == folder, "what is there needs no network"
    monkeypatch.setattr(image, "DISK_BYTES", 1 << 29)
    with pytest.raises(ImageError, match="asked for packages"):
        image.obtain()


class NoNetwork:
    def __init__(self, *_: object) -> None:
        raise ImageError("asked for packages")


def test_a_file_system_holds_what_was_put_in_whoever_makes_it_when(tmp_path: Path) -> None:
    tree = {
        "usr/bin/x": Entry.file(b"#!", 0o755),
        "etc/secret": Entry.file(b"s", 0o600),
        "bin": Entry.link("usr/bin"),
        "root": Entry(0o40700),
    }
    first, second = tmp_path / "1", tmp_path / "2"
    make_ext4(first, tree, 16 << 20, 7)
    began = time.time()
    while int(time.time()) == int(began):  # the kernel's time stamps are what must not show
        time.sleep(0.01)
    before = os.umask(0o077)
    try:
        make_ext4(second, dict(reversed(tree.items())), 16 << 20, 7)
    finally:
        os.umask(before)
    assert digest(first) == digest(second)
    listing = subprocess.run(
        ["debugfs", "-R", "stat /etc/secret", str(first)], capture_output=True, text=True, check=True
    ).stdout
    assert "Mode:  0600" in listing
    assert "User:     0" in listing
    fsck = subprocess.run(["e2fsck", "-fn", str(first)], capture_output=True, text=True, check=False)
    assert fsck.returncode == 0, fsck.stdout


def test_a_tree_that_has_no_room_is_told(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="mke2fs failed"):
        make_ext4(tmp_path / "x", {"big": Entry.file(bytes(os.urandom(32 << 20)))}, 32 << 20, 7)


def test_keys_for_dropbear(tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    try:
        keys.make()
    except ImageError as error:
        unsupported(error)
    data = keys.host_for_dropbear()
    assert data[:19] == b"\0\0\0\x0bssh-ed25519" + b"\0\0\0\x40"
    assert len(data) == 19 + 64
    public = base64.b64decode(keys.public(HOST).split()[1])
    assert public.endswith(data[-32:])
    made = keys.public(HOST)
    keys.make()
    assert keys.public(HOST) == made, "made once"


@pytest.mark.parametrize("damage", ["", "b3BlbnNzaA==", "not base64!", "b3BlbnNzaC1rZXktdjEA/////w=="])
def test_a_key_that_is_none(damage: str) -> None:
    with pytest.raises(ImageError, match="cannot read ssh-keygen's key"):
        to_dropbear(f"-----BEGIN OPENSSH PRIVATE KEY-----\n{damage}\n-----END OPENSSH PRIVATE KEY-----\n")


def test_copies_are_as_sparse_as_what_they_are_of(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    with old.open("wb") as file:
        file.truncate(64 << 20)
        os.pwrite(file.fileno(), b"middle", 33 << 20)
    copy_sparse(old, new)
    assert digest(old) == digest(new)
    assert new.stat().st_blocks * 512 < 1 << 20
    with pytest.raises(BedError, match="cannot copy the root file system"):
        copy_sparse(old, new)


# -- guests ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_linux_boots_from_nfs_and_migrates_with_an_ssh_session(bed: Bed) -> None:
    evidence = Evidence()
    # The pages that the guest writes again and again take a second at this rate, so that none of its sleeps is as long as a
    # pass: after each there are more left than go within QEMU's least downtime.
    slow = {"max-bandwidth": 8 << 20}
    settings = MigrationSettings(passes=3, downtime_limit_ms=20_000, parameters=slow)
    Ssh().run(ScenarioContext(bed, GUEST, settings), evidence)
    [record], [conversation] = evidence.passages, evidence.conversations
    assert record.completed, record.info
    assert record.pass_count > 3
    assert record.problems == []
    assert record.content == []
    assert record.pages_checked == 2000
    assert conversation.answers > 3
    assert conversation.problems == []
    assert record.transferred > 2000 * 4096


@pytest.mark.slow
def test_a_page_that_was_lost_is_found(bed: Bed) -> None:
    guest = bed.kind.guest(GUEST)
    assert isinstance(guest, LinuxGuest)
    vm = bed.source(GUEST)
    bed.warm_up(vm, guest)
    vm.command("stop")
    pages, problems = guest.check(vm)
    assert (pages, problems) == (2000, [])
    status = guest.mark(vm)
    assert not vm.runs()
    first = int(status.word(1, DirtyramWord.FIRST))
    lost = vm.virtual_memory

    def with_old_page(address: int, size: int, cpu: int) -> bytes:
        data = np.frombuffer(lost(address, size, cpu), np.uint8).copy()
        if address & 0xFFFFFF == WORK_OFFSET:
            data[first * 4096 : first * 4096 + 4] = 0
        return data.tobytes()

    vm.virtual_memory = with_old_page  # type: ignore[method-assign]
    _, problems = guest.check(vm)
    assert len(problems) == 1
    assert "cpu 1" in problems[0]
    assert "page 0 of its share" in problems[0]
    assert "holds 0" in problems[0]


def test_a_guest_that_does_not_boot_shows_its_console(
    linux: QemuLinuxKind, root: None, tmp_path: Path
) -> None:
    folder = tmp_path / "image"
    folder.mkdir()
    for name in (image.KERNEL, image.INITRAMFS, "manifest.json"):
        (folder / name).write_bytes((linux.image.folder / name).read_bytes())
    (folder / image.ROOT).write_bytes(bytes(1 << 20))  # no file system
    broken = QemuLinuxKind()
    broken.image = LinuxImage(folder, linux.image.keys)
    with Bed(broken, 0) as bed:
        vm = bed.source(GUEST)
        with pytest.raises(VmError, match=r"its console's last lines:\n(?s:.*)/dev/vda cannot be mounted"):
            bed.warm_up(vm, broken.guest(GUEST))


@pytest.mark.slow
def test_a_linux_guest_is_pinged_and_talked_to_across_the_route_switch(bed: Bed) -> None:
    evidence = Evidence()
    failover = Failover(session="ssh", answers=20)
    failover.run(ScenarioContext(bed, GUEST, MigrationSettings(downtime_limit_ms=20_000)), evidence)
    [record], [reached], [conversation] = evidence.passages, evidence.reachability, evidence.conversations
    assert record.completed, record.info
    assert record.problems == record.content == conversation.problems == []
    assert len(reached.switched) == 1
    assert PingCheck().judge(evidence).problems == []
    late = [ping for ping in reached.pings if ping.answers and ping.sent > reached.switched[0]]
    assert len(late) >= 20


def test_a_killed_run_leaves_no_server_and_no_guest(linux: QemuLinuxKind, root: None, cli: Any) -> None:
    command = [sys.executable, "-m", "sterna", "testbed", "run", "migrate", "--vm", "qemu-linux"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        running: dict[int, str] = {}

        def all_up() -> bool:
            assert process.poll() is None
            running.update(descendants(process.pid))
            names = list(running.values())
            return names.count("qemu-system-arm") == 2 and {"rpcbind", "ganesha.nfsd"} <= set(names)

        try:
            wait_for(all_up)
        finally:
            process.kill()
    wait_for(lambda: not any(alive(pid) for pid in running))
    assert not [line for line in Path("/proc/mounts").read_text().splitlines() if line.startswith("sterna")]
    code, out, _ = cli("testbed", "clean")
    assert code == 0
    assert "removed directory /tmp/sterna-testbed-" in out
    with Bed(linux, 0) as bed:
        assert bed.network.note == "", "another run finds all as it was"


def descendants(pid: int) -> Iterator[tuple[int, str]]:
    """The processes below one, and what they run."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            yield child, Path(f"/proc/{child}/exe").resolve().name
        yield from descendants(child)


# -- what is missing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("program", "package"), [("rpcbind", "rpcbind"), ("ganesha.nfsd", "nfs-ganesha")])
def test_missing_servers_are_named_with_their_package(
    program: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sterna.testbed import nfs

    which = nfs.shutil.which
    monkeypatch.setattr(
        nfs.shutil,
        "which",
        lambda name, path=None: None if name == program else which(name, path=path) or "/x",
    )
    with pytest.raises(Unsupported, match=f"^{program} is missing: apt install {package}$"):
        nfs.check_tools()


def test_a_qemu_without_nfs_is_told(tmp_path: Path) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text("#!/bin/sh\necho \"$0: -blockdev driver=nfs: Unknown driver 'nfs'\" >&2\nexit 1\n")
    qemu.chmod(0o755)
    with pytest.raises(Unsupported, match="has no NFS client: apt install qemu-block-extra"):
        qemu_linux._check_client(str(qemu))


def test_a_server_that_cannot_start_says_why(linux: QemuLinuxKind, root: None, tmp_path: Path) -> None:
    with Bed(without_set_up(), 0) as bed, pytest.raises(BedError, match=r"ganesha\.nfsd"):
        NfsServer(bed.network.server, tmp_path / "nothing", tmp_path)


def without_set_up() -> QemuLinuxKind:
    """One that furnishes nothing."""
    from contextlib import nullcontext

    alone = QemuLinuxKind(KindOptions())
    alone.set_up = lambda network, directory: nullcontext()  # type: ignore[method-assign,assignment]
    return alone


def test_without_root_the_disk_is_a_file(linux: QemuLinuxKind, tmp_path: Path) -> None:
    with linux.set_up(LoopbackNetwork(0, "no root"), tmp_path):
        store = linux._store
        assert "file.driver=file" in store.blockdev(store.new_disk(linux.image))


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
