"""Migrations with multifd between two sternas."""

import pytest
from tests.migration.pairs import TCP, Host, assert_one_runs, hosts, source_guest, waiting_guest

from sterna.migration.statistics import MigrationStatus

COMPLETED, FAILED = MigrationStatus.COMPLETED, MigrationStatus.FAILED


def switch_on(*both: Host, channels: int = 2, compression: str = "none", **parameters: object) -> None:
    for host in both:
        host.controller.set_capabilities({"multifd": True})
        host.controller.set_parameters(
            {"multifd-channels": channels, "multifd-compression": compression, **parameters}
        )


# Slow enough that pages change between passes, and never so that all of the rest fits.
SLOW = {"max-bandwidth": 4 << 20, "downtime-limit": 0}


@pytest.mark.parametrize("compression", ["none", "zlib", "zstd"])
@pytest.mark.parametrize("channels", [1, 2, 16])
def test_a_running_guest_moves(channels: int, compression: str) -> None:
    with hosts(source_guest(700), waiting_guest(700)) as (here, there):
        switch_on(here, there, channels=channels, compression=compression)
        here.controller.set_parameters(SLOW)
        here.controller.migrate(there.controller.incoming(TCP))
        here.wait_pass(4)
        here.controller.set_parameters({"downtime-limit": 1000, "max-bandwidth": 0})
        info = here.outcome()
        assert info.status is COMPLETED, info.error
        assert there.outcome().status is COMPLETED
        assert info.verified is True
        assert assert_one_runs(here.guest, there.guest) is there.guest
        assert 0 < info.multifd_bytes < info.transferred
        assert info.to_qmp()["ram"]["multifd-bytes"] == info.multifd_bytes
