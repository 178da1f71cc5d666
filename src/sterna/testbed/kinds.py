"""The kinds of VM that scenarios can test, by name."""

from sterna.testbed.kind import KindOptions, QemuKind, SternaKind, VmKind

KINDS = ("emulated", "kvm", "qemu", "qemu-linux")


def make_kind(name: str, options: KindOptions) -> VmKind:
    """The kind of VM of that name, one of `KINDS`."""
    if name == "qemu":
        return QemuKind(options)
    if name == "qemu-linux":
        from sterna.testbed.linuxguest.kind import QemuLinuxKind

        return QemuLinuxKind(options)
    return SternaKind(name, options)
