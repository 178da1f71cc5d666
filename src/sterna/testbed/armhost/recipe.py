"""What the host is made of."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from sterna.testbed.armhost.errors import ArmHostError
from sterna.testbed.debian.apt import SUITE

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

NOT_THERE = frozenset({"import-linter", "mypy", "numba", "pyroute2", "ruff", "unicorn", "ziglang"})
"""Dependencies of sterna's that the host does without: the emulated CPU, the tools of development, links between hosts."""
WHEEL_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")

KERNEL_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_net")

_NAME = re.compile(r"[^A-Za-z0-9_.-]")

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
    """A host for a checkout of sterna: with the Python packages that its pyproject.toml names, tests included.

    :raise ArmHostError: When the folder is no checkout.
    """
    path = tree / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text())["project"]
        wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    except (OSError, KeyError, ValueError) as error:
        raise ArmHostError(f"{tree} is no checkout of sterna: {path.name}: {error}") from error
    # Conditions are left out: they speak of the Python that runs this, and pip would ask it.
    names = {text.partition(";")[0].strip() for text in wanted}
    return Recipe(
        tuple(sorted(name for name in names if _NAME.split(name, maxsplit=1)[0] not in NOT_THERE)), kernel
    )
