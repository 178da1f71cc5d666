"""An ext4 file system in a file, made without mounting it. The same tree makes the same bytes."""

import os
import shutil
import stat
import subprocess
import tempfile
from pathlib import Path

from sterna.testbed.debian.apt import run
from sterna.testbed.debian.deb import Tree
from sterna.testbed.errors import ImageError

_ID = "c5a1f7d6-53b2-4e4a-9c62-0f2e8d5b7a01"
_HASH_SEED = "c5a1f7d6-53b2-4e4a-9c62-0f2e8d5b7a02"
_JOURNAL_MIB = 4
_TIMES = ("atime", "ctime", "mtime", "crtime")
_OTHERS = ("uid", "gid", *(f"{name}_extra" for name in _TIMES))


def make_ext4(path: Path, tree: Tree, size: int, mtime: int) -> None:
    """Write a file system of `size` bytes with `tree` in it to a new file, sparse.

    :param mtime: every time stamp in it
    :raise ImageError: When a tool is missing, or the tree has no room.
    """
    for tool in ("mke2fs", "debugfs"):
        if shutil.which(tool) is None:
            raise ImageError(f"{tool} is missing: apt install e2fsprogs")
    with tempfile.TemporaryDirectory(prefix="sterna-linux-") as temporary:
        folder = Path(temporary) / "root"
        _make_folder(folder)
        _lay_out(folder, tree)
        for parent, names, files in os.walk(folder, topdown=False):
            for name in (*names, *files):
                os.utime(Path(parent) / name, (mtime, mtime), follow_symlinks=False)
        os.utime(folder, (mtime, mtime))
        with path.open("xb") as file:
            file.truncate(size)
        options = f"hash_seed={_HASH_SEED},lazy_itable_init=1,nodiscard"
        run(
            [
                *("mke2fs", "-q", "-t", "ext4", "-d", str(folder), "-U", _ID),
                *("-E", options, "-J", f"size={_JOURNAL_MIB}", "-L", "sterna-root", str(path)),
            ],
            "root file system",
            more={"E2FSPROGS_FAKE_TIME": str(mtime)},
        )
        _level(path, folder, Path(temporary) / "commands", mtime)


def _lay_out(folder: Path, tree: Tree) -> None:
    for name, entry in sorted(tree.items()):
        path = folder / name
        _make_folder(path.parent)
        if stat.S_ISDIR(entry.mode):
            _make_folder(path)
        elif stat.S_ISLNK(entry.mode):
            path.symlink_to(entry.content.decode())
            continue
        else:
            path.write_bytes(entry.content)
        path.chmod(stat.S_IMODE(entry.mode))


def _make_folder(path: Path) -> None:
    """With its parents, and the permissions of a system's folders whatever the umask is."""
    if not path.is_dir():
        _make_folder(path.parent)
        path.mkdir()
        path.chmod(0o755)


def _level(path: Path, folder: Path, script: Path, mtime: int) -> None:
    """mke2fs takes over owners and the time at which each file was made in `folder`: make them all the same."""
    names = ["/", *sorted(f"/{entry.relative_to(folder)}" for entry in folder.rglob("*")), "/lost+found"]
    lines = []
    for name in names:
        lines += [f'set_inode_field "{name}" {field} @{mtime}' for field in _TIMES]
        lines += [f'set_inode_field "{name}" {field} 0' for field in _OTHERS]
    script.write_text("".join(f"{line}\n" for line in lines))
    done = subprocess.run(
        ["debugfs", "-w", "-f", str(script), str(path)],
        env=os.environ | {"E2FSPROGS_FAKE_TIME": str(mtime), "LC_ALL": "C"},
        capture_output=True,
        text=True,
        check=False,
    )
    # It goes on after an error and ends with 0; each command is echoed on standard output.
    complaints = [line for line in done.stderr.splitlines() if not line.startswith("debugfs ")]
    if done.returncode or complaints:
        raise ImageError(f"debugfs: {'; '.join(complaints[:3]) or f'exit code {done.returncode}'}")
