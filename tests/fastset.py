"""Tests by what they need. `pytest --fast` runs those that need nothing but a processor, and that for a moment, and sees to
it that this is so: a test of the fast set that uses KVM, a QEMU or a namespace of its own fails.
"""

import os
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

NEEDS = ("arm64host", "kvm", "network", "qemu", "root", "slow")
_BY_FIXTURE = {
    "arm64_image": ("arm64host", "network", "qemu"),
    "kvm": ("kvm",),
    "linux": ("network", "qemu"),
    "qemu": ("qemu",),
    "root": ("root",),
    "to_compare": ("kvm",),
    "x86": ("kvm",),
}
"""Markers of the tests that ask for a fixture."""
_NAMESPACES = {"nsenter", "setns", "unshare"}


class Guard:
    """Notes what a test of the fast set may not do.

    :ivar found: what it was, in a few words each
    """

    def __init__(self) -> None:
        self.found: list[str] = []

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """For `sys.addaudithook`: https://docs.python.org/3/library/audit_events.html."""
        if event == "open" and arguments[0] in ("/dev/kvm", b"/dev/kvm"):
            self.found.append("opens /dev/kvm")
        elif event == "ctypes.dlsym" and arguments[-1] in _NAMESPACES:
            self.found.append(f"calls {arguments[-1]}")
        elif event in ("subprocess.Popen", "os.exec", "os.posix_spawn"):
            words = [arguments[0], *([] if isinstance(arguments[1], str | bytes) else arguments[1])]
            self._look([os.fsdecode(word) for word in words if isinstance(word, str | bytes | os.PathLike)])

    def _look(self, words: list[str]) -> None:
        programs = {os.path.basename(word) for word in words}
        self.found += [f"runs {name}" for name in sorted(programs) if name.startswith("qemu-system-")]
        self.found += [f"runs {name}" for name in sorted(programs & _NAMESPACES)]
        if "kvm" in words:
            self.found.append("runs a program with kvm as its argument")

    def taken(self) -> str:
        """All that was found since it was asked before."""
        text = ", ".join(dict.fromkeys(self.found))
        self.found.clear()
        return text


_GUARD = pytest.StashKey[Guard]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help=f"only tests without a marker of {', '.join(NEEDS)}")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        config.stash[_GUARD] = guard = Guard()
        sys.addaudithook(guard.audit)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for fixture in getattr(item, "fixturenames", ()):
            for marker in _BY_FIXTURE.get(fixture, ()):
                item.add_marker(marker)
        # Where one of a test's parameters is KVM.
        if "kvm" in re.split(r"[^a-z0-9]", item.name.partition("[")[2]):
            item.add_marker("kvm")
    if config.getoption("--fast"):
        left_out = [item for item in items if any(item.get_closest_marker(name) for name in NEEDS)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True)
def _nothing_else_is_used(pytestconfig: pytest.Config) -> Iterator[None]:
    guard = pytestconfig.stash.get(_GUARD, None)
    yield
    if guard is not None and (found := guard.taken()):
        pytest.fail(
            f"a test of the fast set {found}: give it its marker, one of {', '.join(NEEDS)}", pytrace=False
        )
