"""Numbers and structures are those of the kernel's headers, which a C compiler reads."""

import ctypes
import importlib
import pkgutil
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import sterna.arch
import sterna.hypervisor.kvm
from sterna.hypervisor.kvm.ioctl import Request
from sterna.hypervisor.kvm.run import ExitCode
from sterna.hypervisor.kvm.system import Capability

_FOREIGN = {"x86_64": ("arm", "arm64", "armv7"), "aarch64": ("x86_64",)}
"""Architectures that a host's KVM has nothing to do with."""

_WHOLE = ("exception_has_payload", "exception_payload", "sipi_vector", "flags", "reserved")


def _event_part(field):
    """Where a part of the flattened structure is in the header's."""
    if field in _WHOLE:
        return field
    group = "triple_fault" if field.startswith("triple_fault_") else field.partition("_")[0]
    part = field.removeprefix(f"{group}_")
    return f"{group}.{'smm_inside_nmi' if part == 'inside_nmi' else part}"


_FLATTENED = {"kvm_vcpu_events": _event_part}


def modules(machine):
    """All modules of the binding that are not another architecture's."""
    for package in (sterna.hypervisor.kvm, sterna.arch):
        for info in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
            parts = info.name.split(".")
            if "kvm" in parts and parts[2] not in _FOREIGN[machine]:
                yield importlib.import_module(info.name)


def definitions(machine, kind):
    found = {}
    for module in modules(machine):
        for value in vars(module).values():
            if isinstance(value, kind) and getattr(value, "__module__", module.__name__) != "ctypes":
                found[getattr(value, "name", None) or value.__name__] = value
    return found


def structures(machine):
    """Structures whose docstring names the C structure that they are: name, class, whether they are whole."""
    for structure in definitions(machine, type(ctypes.Structure)).values():
        words = (structure.__doc__ or "").replace(",", " ").replace(":", " ").split()
        if words[:1] == ["struct"]:
            yield words[1], structure, "with" not in words and "without" not in words
        elif words and words[0].startswith("kvm_run."):
            yield words[0], structure, False


def expectations(machine):
    """C expressions, the values that they must have, and the name that the header must know for that."""
    for request in definitions(machine, Request).values():
        yield request.name, request.number, request.name
    for capability in Capability:
        name = f"KVM_CAP_{capability.name}"
        yield name, int(capability), name
    for code in ExitCode:
        name = f"KVM_EXIT_{code.name}"
        yield name, int(code), name
    yield "KVM_DIRTY_LOG_PAGE_OFFSET", 64, "kvm_dirty_gfn"
    for name, structure, whole in structures(machine):
        union, _, member = name.partition(".")
        if whole:
            yield f"sizeof(struct {name})", ctypes.sizeof(structure), name
        rename = _FLATTENED.get(name, lambda field: field)
        for field, *_ in structure._fields_:
            if field in ("padding", "exit", "head", "entries", "nmi_pad"):
                continue
            offset = getattr(structure, field).offset
            if member:
                yield (
                    f"offsetof(struct {union}, {member}.{field}) - offsetof(struct {union}, {member})",
                    offset,
                    member,
                )
            else:
                yield f"offsetof(struct {name}, {rename(field)})", offset, name


def check(machine, header, compiler, source):
    known = header.read_text() + (source.parent / "asm.h").read_text()
    assertions = []
    for expression, value, name in expectations(machine):
        assertion = f'_Static_assert({expression} == {value}, "{expression} is not {value}");\n'
        # Headers may be older than what the binding knows of, and leave out what is another architecture's.
        if expression == name:
            assertions.append(f"#ifdef {name}\n{assertion}#endif\n")
        elif name in known:
            assertions.append(assertion)
    assert len(assertions) > 100
    source.write_text("#include <stddef.h>\n#include <linux/kvm.h>\n" + "".join(assertions))
    command = [*compiler, "-w", "-c", "-o", source.with_suffix(".o"), source]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False)
    assert compiled.returncode == 0, "\n".join(
        line for line in compiled.stderr.splitlines() if "error" in line
    )


@pytest.mark.parametrize(("machine", "own"), [("x86_64", "kvm_sregs"), ("aarch64", "kvm_one_reg")])
def test_structures_are_those_of_one_architecture_and_of_all(machine, own):
    names = {name for name, *_ in structures(machine)}
    assert names >= {"kvm_userspace_memory_region", own}
    assert len(names & {"kvm_sregs", "kvm_one_reg"}) == 1


def test_installed_headers(tmp_path):
    machine = platform.machine()
    header = Path("/usr/include/linux/kvm.h")
    if machine not in _FOREIGN or not header.exists() or shutil.which("cc") is None:
        pytest.skip("the kernel's headers (linux-libc-dev) or a C compiler are not installed")
    [asm] = Path("/usr/include").glob(f"{machine}-linux-*/asm/kvm.h")
    (tmp_path / "asm.h").write_text(asm.read_text())
    check(machine, header, ["cc"], tmp_path / "layout.c")


@pytest.mark.parametrize("machine", sorted(_FOREIGN))
def test_headers_of_the_cross_compiler(machine, tmp_path):
    ziglang = pytest.importorskip("ziglang")
    include = Path(ziglang.__file__).parent / "lib/libc/include"
    asm = include / f"{machine.replace('x86_64', 'x86')}-linux-any/asm/kvm.h"
    (tmp_path / "asm.h").write_text(asm.read_text())
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", f"{machine}-linux-musl"]
    check(machine, include / "any-linux-any/linux/kvm.h", compiler, tmp_path / "layout.c")
