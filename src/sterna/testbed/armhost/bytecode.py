"""Python modules of the host, compiled while its image is built: the emulated CPU takes ten times as long for that.

Bytecode belongs to one version of Python. Where this Python is of the host's version it compiles them; otherwise the host
does, once, those that it is going to need (warmup.py).
"""

import compileall
import io
import re
import sys
import tarfile
import tempfile
from pathlib import Path
from py_compile import PycInvalidationMode

from sterna.host.limits import usable_cpus
from sterna.testbed.armhost import emulator
from sterna.testbed.armhost.recipe import PYTHON_VERSION
from sterna.testbed.debian.cpio import Entry
from sterna.testbed.debian.deb import Tree
from sterna.testbed.errors import ImageError

_TIMEOUT_S = 600
_MODULE = re.compile(r"usr/lib/python3.*\.py$")
_SELDOM_NEEDED = re.compile(
    r".*/(distutils/|pygments/lexers/(?!__init__|_mapping|diff|python\b)|pygments/styles/[a-z])"
)


def same_python() -> bool:
    """This Python's bytecode is good for the host's."""
    final = sys.version_info.releaselevel == "final" and sys.implementation.name == "cpython"
    return final and f"{sys.version_info.major}.{sys.version_info.minor}" == PYTHON_VERSION


def compiled_here(tree: Tree) -> Tree:
    """The bytecode of a file system's modules, as files to add to it; by this Python."""
    with tempfile.TemporaryDirectory(prefix="sterna-armhost-") as temporary:
        root = Path(temporary)
        for path, entry in tree.items():
            if _MODULE.match(path) and not _SELDOM_NEEDED.match(path):
                (root / path).parent.mkdir(parents=True, exist_ok=True)
                (root / path).write_bytes(entry.content)
        compileall.compile_dir(
            root,
            maxlevels=64,
            quiet=2,  # some packages bring files that are not for this version
            workers=usable_cpus(),
            stripdir=temporary,
            prependdir="/",
            invalidation_mode=PycInvalidationMode.UNCHECKED_HASH,
        )
        return {str(path.relative_to(root)): Entry.file(path.read_bytes()) for path in root.rglob("*.pyc")}


def compiled_there(kernel: Path, initramfs: Path) -> Tree:
    """The same by the host's own Python, of the modules that it is going to need.

    :param kernel: boots the file system
    :param initramfs: the file system as it is
    :raise ImageError: When Python does not run in the host.
    """
    out, err = io.BytesIO(), io.BytesIO()
    code = emulator.run(
        kernel,
        initramfs,
        ["python3", "-c", Path(__file__).with_name("warmup.py").read_text()],
        settings=emulator.HostSettings(),
        tree=None,
        out=out,
        err=err,
        timeout_s=_TIMEOUT_S,
    )
    if code:
        complaint = err.getvalue().decode(errors="replace").strip()
        raise ImageError(f"Python does not work inside the host\n{complaint}")
    out.seek(0)
    found: Tree = {}
    with tarfile.open(fileobj=out) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            found[member.name.lstrip("/")] = Entry.file(content.read())
    return found
