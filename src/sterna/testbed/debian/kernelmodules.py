"""Kernel modules: which others each needs, in the order to load them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from elftools.elf.elffile import ELFFile

from sterna.testbed.errors import ImageError


def load_order(modules: Mapping[str, bytes], wanted: Sequence[str]) -> list[str]:
    """The paths of the modules to load, each after those that it depends on.

    Modules that are not there are taken for built into the kernel.

    :param modules: all modules of a kernel, uncompressed, by path
    :param wanted: module names
    """
    by_name = {_name(path): path for path in modules}
    order: list[str] = []

    def add(name: str, chain: tuple[str, ...]) -> None:
        path = by_name.get(name)
        if path is None or path in order:
            return
        if name in chain:
            raise ImageError(f"kernel modules depend on each other: {' -> '.join((*chain, name))}")
        for dependency in _depends(modules[path]):
            add(dependency, (*chain, name))
        order.append(path)

    for name in wanted:
        add(name, ())
    return order


def _name(path: str) -> str:
    return PurePosixPath(path).name.removesuffix(".ko").replace("-", "_")


def _depends(module: bytes) -> list[str]:
    """The module's own list (Linux, scripts/mod/modpost.c: ``depends=`` in section .modinfo)."""
    section = ELFFile(io.BytesIO(module)).get_section_by_name(".modinfo")
    for field in section.data().split(b"\0") if section else ():
        if field.startswith(b"depends="):
            return [name.replace("-", "_") for name in field[8:].decode().split(",") if name]
    return []
