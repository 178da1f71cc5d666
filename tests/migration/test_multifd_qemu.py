"""Multifd with a QEMU on the other end: its paused machine comes here with all its pages, and goes on to another QEMU."""

import os
from pathlib import Path

import numpy as np
import pytest
from tests.migration.test_qemu import RAM, Carrier, qemu
from tests.savedstream import saved, saving

from sterna.migration.controller import MigrationController
from sterna.migration.statistics import MigrationStatus

pytestmark = pytest.mark.qemu


def capabilities(**states: bool) -> list[dict[str, object]]:
    return [{"capability": name.replace("_", "-"), "state": state} for name, state in states.items()]


@pytest.mark.parametrize(
    ("channels", "compression"),
    [(1, "none"), (2, "none"), (4, "none"), (2, "zlib"), (4, "zlib"), (1, "zstd"), (2, "zstd"), (4, "zstd")],
)
def test_from_qemu_and_on_to_qemu(channels: int, compression: str, tmp_path: Path) -> None:
    settings = {"multifd-channels": channels, "multifd-compression": compression}
    image = tmp_path / "image"
    content = os.urandom(3 << 20) + b"abc" * (1 << 20) + bytes(1 << 20) + b"z"
    image.write_bytes(content)
    loader = ["-device", f"loader,file={image},addr={RAM + (16 << 20):#x},force-raw=on"]
    with qemu(tmp_path, "-m", "64") as first:
        first.ask("migrate-set-capabilities", capabilities=capabilities(events=True))
        first.ask("migrate", uri=saving(tmp_path / "stream"))
        first.wait_event("MIGRATION", status="completed")
    guest = Carrier(saved(tmp_path / "stream"))
    pattern = np.random.default_rng(3).integers(0, 256, 4 << 20, dtype=np.uint8)
    with MigrationController(guest) as controller:
        controller.set_capabilities({"multifd": True})
        controller.set_parameters(settings)
        address = controller.incoming(f"unix:{tmp_path}/in")
        with qemu(tmp_path, "-m", "64", *loader) as second:
            second.ask("migrate-set-capabilities", capabilities=capabilities(events=True, multifd=True))
            second.ask("migrate-set-parameters", **settings)
            second.ask("migrate", uri=address)
            second.wait_event("MIGRATION", status="completed")
        info = controller.wait(300)
        assert info.status is MigrationStatus.COMPLETED, info.error
        assert guest.resumed == 1
        main = next(block for block in guest.ram_blocks if block.name == "mach-virt.ram")
        assert main.data[16 << 20 :][: len(content)].tobytes() == content
        assert info.normal_pages >= 6 << 20 >> 12
        main.data[8 << 20 : 12 << 20] = pattern
        with qemu(tmp_path, "-m", "64", "-incoming", "defer") as third:
            third.ask("migrate-set-capabilities", capabilities=capabilities(multifd=True))
            third.ask("migrate-set-parameters", **settings)
            third.ask("migrate-incoming", uri=f"unix:{tmp_path}/out")
            controller.migrate(f"unix:{tmp_path}/out")
            info = controller.wait(300)
            assert (info.status, info.peer) == (MigrationStatus.COMPLETED, "qemu"), info.error
            assert guest.away
            assert info.multifd_bytes > 0
            third.ask("pmemsave", val=RAM, size=64 << 20, filename=f"{tmp_path}/memory")
            assert (tmp_path / "memory").read_bytes() == main.data.tobytes()
    guest.close()
