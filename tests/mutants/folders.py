"""The folders whose tests are judged, and which tests are their own."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Folder:
    """Sources, and the tests that have to notice a change to them.

    :ivar sources: a folder of source files
    :ivar tests: files and folders of tests
    :ivar left_out: sources that are not changed, each with the reason
    """

    sources: str
    tests: tuple[str, ...]
    left_out: dict[str, str] = field(default_factory=dict)


FOLDERS = {
    "stage2": Folder(
        "src/sterna/stage2",
        ("tests/stage2", "tests/arch/arm64/test_stage2.py", "tests/arch/armv7/test_stage2.py"),
    ),
    "migration": Folder("src/sterna/migration", ("tests/migration",)),
    "analysis": Folder("src/sterna/analysis", ("tests/analysis",)),
    "stream": Folder(
        "src/sterna/stream",
        (
            "tests/stream",
            "tests/migration/test_multifd.py",
            "tests/migration/test_multifd_packets.py",
            "tests/migration/test_xbzrle.py",
        ),
    ),
    "devices": Folder(
        "src/sterna/machine/devices",
        (
            "tests/machine/test_gic.py",
            "tests/machine/test_pl011.py",
            "tests/machine/test_state.py",
            "tests/machine/test_sections.py",
        ),
    ),
    "virtio": Folder(
        "src/sterna/machine/virtio",
        (
            "tests/machine/test_sections.py",
            "tests/machine/test_virtqueue.py",
            "tests/machine/test_virtio_net.py",
            "tests/machine/test_virtio_rng.py",
            "tests/machine/test_nic.py",
        ),
    ),
    "hypervisor": Folder(
        "src/sterna/hypervisor",
        ("tests/arch", "tests/hypervisor"),
    ),
    "arch": Folder(
        "src/sterna/arch",
        (
            "tests/arch",
            "tests/hypervisor",
            "tests/machine/test_sections.py",
            "tests/machine/test_state.py",
        ),
        dict.fromkeys(
            ("src/sterna/arch/arm/kvm", "src/sterna/arch/arm64/kvm.py"),
            "runs on arm64 hosts only, by tests/arm64",
        ),
    ),
}
