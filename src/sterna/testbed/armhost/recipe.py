"""What the host is made of."""

import importlib.metadata
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from sterna.testbed.debian.apt import SUITE
from sterna.testbed.errors import ImageError

PYTHON_VERSION = "3.11"
"""The suite's."""

KERNELS = {"stable": SUITE, "backports": f"{SUITE}-backports"}
"""Which kernel: the suite it comes from. Stable is Linux 6.1; backports has a later one, with KVM's dirty ring."""

DEBIAN_PACKAGES = ("python3", "busybox-static", "libstdc++6")
LEFT_OUT = frozenset(
    {
        "adduser",
        "coreutils",
        "debconf",
        "dpkg",
        "libaudit-common",
        "libaudit1",
        "libcap-ng0",
        "libdb5.3",
        "libgmp10",
        "libpam-modules",
        "libpam-modules-bin",
        "libpam0g",
        "libsemanage-common",
        "libsemanage2",
        "libsepol2",
        "passwd",
        "tar",
    }
)
"""What the packages depend on for their installation scripts, which do not run here; busybox has the tools."""

NOT_THERE = frozenset(
    {"import-linter", "jinja2", "mypy", "numba", "pyroute2", "ruff", "setuptools", "unicorn", "ziglang"}
)
"""Dependencies of sterna's that the host does without: the emulated CPU, the tools of development, links between hosts, the page
of a run."""
WHEEL_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")

KERNEL_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_net")

_NAME = re.compile(r"[^A-Za-z0-9_.-]")
_DEV = re.compile(r"""extra == ["']dev["']""")

EPOCH = 1_700_000_000
"""Time stamp of every file in the image."""


@dataclass(frozen=True)
class Recipe:
    """The choices among hosts.

    :ivar python_packages: what pip is to fetch
    :ivar kernel: a key of `KERNELS`
    """

    python_packages: tuple[str, ...]
    kernel: str = "stable"


def recipe_for(tree: Path, kernel: str = "stable") -> Recipe:
    """A host for sterna, tests included: with the Python packages that its pyproject.toml names.

    :param tree: a checkout, or the folder of the package where that was installed without one
    :raise ImageError: When the folder is neither.
    """
    # Conditions are left out: they speak of the Python that runs this, and pip would ask it.
    wanted = {_plain(text.partition(";")[0]) for text in _requirements(tree)}
    names = sorted(name for name in wanted if _NAME.split(name, maxsplit=1)[0] not in NOT_THERE)
    return Recipe(tuple(names), kernel)


def _requirements(tree: Path) -> list[str]:
    """What sterna and its development need, as pyproject.toml has it, or the metadata of what is installed."""
    path = tree / "pyproject.toml"
    if is_package(tree):
        try:
            found = importlib.metadata.requires(tree.name) or []
        except importlib.metadata.PackageNotFoundError as error:
            raise ImageError(
                f"{tree} is neither in a checkout of sterna nor installed: give a checkout with --tree"
            ) from error
        return [text for text in found if "extra ==" not in text or _DEV.search(text)]
    try:
        project = tomllib.loads(path.read_text())["project"]
        return [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    except (OSError, KeyError, ValueError) as error:
        raise ImageError(f"{tree} is no checkout of sterna: {path.name}: {error}") from error


def is_package(tree: Path) -> bool:
    """Whether this is the package itself, and no checkout that has it in `src`."""
    return (tree / "__init__.py").is_file()


def _plain(requirement: str) -> str:
    """A name and its limits in one order: tools that write metadata have another."""
    text = re.sub(r"[\s()]", "", requirement)
    at = len(_NAME.split(text, maxsplit=1)[0])
    return text[:at] + ",".join(sorted(text[at:].split(",")))
