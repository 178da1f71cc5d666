"""What the host is made of."""

from dataclasses import dataclass

SUITE = "bookworm"
MIRROR = "http://deb.debian.org/debian"
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

PYTHON_PACKAGES = (
    "backports.zstd>=1.0",
    "click>=8.1",
    "fdt>=0.3.3",
    "hypothesis>=6.100",
    "msgspec>=0.18",
    "numpy>=1.26",
    "pyelftools>=0.31",
    "pytest>=8",
    "qemu.qmp>=0.0.3",
    "rich>=13",
    "xxhash>=3.4",
)
"""What sterna and its tests need, but for the emulated CPU (numba, unicorn) and the tools of development."""
WHEEL_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_28_aarch64", "manylinux_2_34_aarch64")

KERNEL_MODULES = ("virtio_mmio", "virtio_blk", "virtio_console", "virtio_net")

EPOCH = 1_700_000_000
"""Time stamp of every file in the image."""


@dataclass(frozen=True)
class Recipe:
    """The choices among hosts.

    :ivar kernel: a key of `KERNELS`
    """

    kernel: str = "stable"

    @property
    def suites(self) -> tuple[str, ...]:
        """Debian suites that packages come from."""
        return tuple(dict.fromkeys((SUITE, KERNELS[self.kernel])))
