"""The emulated arm64 host itself."""

import io

import pytest
from tests.arm64.conftest import TIMEOUT_S, TREE

from sterna import __version__
from sterna.testbed.armhost import emulator
from sterna.testbed.armhost.emulator import HostSettings
from sterna.testbed.errors import ImageError

pytestmark = [pytest.mark.arm64host, pytest.mark.qemu]


def test_a_command_runs_in_the_tree_with_kvm(in_arm64_host) -> None:
    code, output = in_arm64_host(
        "sh", "-c", "test -c /dev/kvm && test -f src/sterna/__init__.py && uname -m; exit 7"
    )
    assert (code, output) == (7, "aarch64\n")


def test_what_is_installed_runs_without_its_checkout(arm64_image) -> None:
    out = io.BytesIO()
    code = emulator.run(
        *(arm64_image.kernel, arm64_image.initramfs),
        ["sh", "-c", "ls src && python3 -m sterna --version"],
        settings=HostSettings(),
        tree=TREE / "src" / "sterna",
        out=out,
        err=out,
        timeout_s=TIMEOUT_S,
    )
    assert (code, out.getvalue()) == (0, f"sterna\nsterna, version {__version__}\n".encode())


def test_a_host_that_takes_too_long_is_ended(arm64_image) -> None:
    with pytest.raises(ImageError, match="not done after"):
        emulator.run(
            *(arm64_image.kernel, arm64_image.initramfs, ["sleep", "1000"]),
            settings=HostSettings(),
            tree=None,
            out=io.BytesIO(),
            err=io.BytesIO(),
            timeout_s=0.5,
        )


def test_a_kernel_that_cannot_go_on_is_an_error_with_its_last_words(arm64_image, tmp_path) -> None:
    empty = tmp_path / "initramfs"
    empty.write_bytes(b"")
    with pytest.raises(ImageError, match=r"(?s)the host ended before.*Unable to mount root fs"):
        emulator.run(
            *(arm64_image.kernel, empty, ["true"]),
            settings=HostSettings(),
            tree=None,
            out=io.BytesIO(),
            err=io.BytesIO(),
            timeout_s=TIMEOUT_S,
        )
