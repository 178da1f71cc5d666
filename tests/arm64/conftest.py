"""The emulated arm64 host."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from sterna.testbed.armhost import emulator, image
from sterna.testbed.armhost.emulator import HostSettings
from sterna.testbed.armhost.recipe import recipe_for
from sterna.testbed.debian.cache import Image
from sterna.testbed.errors import ImageError

TREE = Path(__file__).parent.parent.parent
TIMEOUT_S = 1800
"""Of a boot and what runs then: on a machine at rest it takes some minutes."""

Run = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def arm64_image() -> Image:
    """The host, built where there is none yet."""
    try:
        emulator.require_qemu()
        return image.obtain(recipe_for(TREE))
    except ImageError as error:
        if os.environ.get("STERNA_REQUIRE_ARM64HOST") == "1":
            pytest.fail(f"{error}, and STERNA_REQUIRE_ARM64HOST=1")
        pytest.skip(f"no arm64 host: {error}")


@pytest.fixture(scope="session")
def in_arm64_host(arm64_image: Image) -> Run:
    """Runs a command in the host, in a copy of this checkout: its exit code, and what it wrote.

    What the argument `check` raises, which is called now and then, ends the host. `image` is another host.
    """

    def run(
        *command: str,
        check: Callable[[], None] = lambda: None,
        image: Image = arm64_image,
        **settings: object,
    ) -> tuple[int, str]:
        output = io.BytesIO()
        code = emulator.run(
            image.kernel,
            image.initramfs,
            command,
            settings=HostSettings(**settings),  # type: ignore[arg-type]
            tree=TREE,
            out=output,
            err=output,
            timeout_s=TIMEOUT_S,
            check=check,
        )
        return code, output.getvalue().decode(errors="replace")

    return run
