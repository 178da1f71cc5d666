"""An earlier version migrates live to this one, and this one to it: nobody updates two hosts in the same moment."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.cli.vms import wait_for
from tests.compatibility.version import COMMITS, Missing, VersionVm, sources

from sterna.launch.process import SternaProcess, VmProcess
from sterna.launch.watch import FINAL

pytestmark = pytest.mark.slow

MACHINE = ("--smp", "2", "--memory", "32M")
GUEST = ("--kernel", "random", "--append", "5 2000")
WAYS: dict[str, tuple[tuple[str, ...], dict[str, object]]] = {
    "plain": ((), {"x-sterna-policy": "fixed"}),
    "xbzrle": ((), {"x-sterna-policy": "adaptive"}),
    "multifd": (("multifd",), {"x-sterna-policy": "fixed", "multifd-channels": 3}),
    "multifd-zstd": (("multifd",), {"x-sterna-policy": "fixed", "multifd-compression": "zstd"}),
}


@pytest.fixture(scope="module", params=COMMITS)
def earlier(request: pytest.FixtureRequest) -> Path:
    """The sources of an earlier version."""
    try:
        return sources(request.param)
    except Missing as error:
        pytest.skip(str(error))


@pytest.fixture(params=["to it", "from it"])
def pair(request: pytest.FixtureRequest, earlier: Path) -> Iterator[tuple[VmProcess, VmProcess]]:
    """A source and a destination, one of them of an earlier version."""
    here, there = (*MACHINE, *GUEST), (*MACHINE, "--incoming", "defer")
    if request.param == "to it":
        with SternaProcess("source", here) as source, VersionVm("destination", there, earlier) as destination:
            yield source, destination
    else:
        with VersionVm("source", here, earlier) as source, SternaProcess("destination", there) as destination:
            yield source, destination


def set_up(vm: VmProcess, way: str) -> None:
    capabilities, parameters = WAYS[way]
    vm.ready()
    for name in capabilities:
        vm.command("migrate-set-capabilities", capabilities=[{"capability": name, "state": True}])
    vm.command("migrate-set-parameters", **{"x-sterna-verify": "on", "max-bandwidth": 64 << 20, **parameters})


@pytest.mark.parametrize("way", WAYS)
def test_a_guest_moves(pair: tuple[VmProcess, VmProcess], way: str, tmp_path: Path) -> None:
    source, destination = pair
    for vm in pair:
        set_up(vm, way)
    uri = f"unix:{tmp_path}/in"
    destination.command("migrate-incoming", uri=uri)
    source.command("migrate", uri=uri)
    wait_for(lambda: source.command("query-migrate")["status"] in FINAL)
    info = source.command("query-migrate")
    assert (info["status"], info["x-sterna"]["verified"]) == ("completed", True), info
    assert source.command("query-status")["status"] == "postmigrate"
    assert destination.command("query-status")["status"] == "running"
