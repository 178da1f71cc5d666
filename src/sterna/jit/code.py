"""Object code of kernels: brought into this process from the cache, or compiled now.

LLVM's linker (llvmlite) loads it, without numba. Nothing is ever unloaded: threads may be in it until the process ends.
"""

import functools
import hashlib
import itertools
import json
from typing import Any

from llvmlite import binding

from sterna.jit import kernelcache
from sterna.jit.fingerprint import fingerprint, sources_changed
from sterna.jit.machinecode import Code
from sterna.jit.source import KernelSource, Key, loading

_number = itertools.count()


def fetch(kernel: KernelSource, key: Key) -> Code:
    """A kernel's machine code, compiled unless that has been done.

    :raise KernelError: When it cannot be compiled.
    """
    code = find(kernel, key)
    if code is None:
        name, stored = file_name(kernel, key), compile_to_file(kernel, key)
        if sources_changed():
            kernelcache.keep(name, stored)
        else:
            kernelcache.write(name, stored)
        code = _link(kernel, key, stored)
        assert code is not None
    return code


def find(kernel: KernelSource, key: Key) -> Code | None:
    """A kernel's machine code if it was compiled before."""
    stored = kernelcache.read(file_name(kernel, key))
    return None if stored is None else _link(kernel, key, stored)


def file_name(kernel: KernelSource, key: Key) -> str:
    """Where in the cache a kernel's code is."""
    return f"{kernel.name.removeprefix('sterna.')}-{fingerprint(kernel, key)}.o"


def compile_to_file(kernel: KernelSource, key: Key) -> bytes:
    """Compile a kernel: a line that says what it is, and an object file.

    :raise KernelError: When it cannot be compiled.
    """
    with loading():
        from sterna.jit.compiler import compile_kernel
    head, code = compile_kernel(kernel, key)
    return json.dumps({**head, "sha256": hashlib.sha256(code).hexdigest()}).encode() + b"\n" + code


@functools.cache
def _linker() -> Any:
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    linker = binding.create_lljit_compiler(
        binding.Target.from_default_triple().create_target_machine(jit=True)
    )
    linker._owned = True
    return linker


def _link(kernel: KernelSource, key: Key, stored: bytes) -> Code | None:
    """The code in a file of the cache; None when it is spoilt."""
    line, _, code = stored.partition(b"\n")
    try:
        head = json.loads(line)
        symbol, entry, returns = str(head["symbol"]), str(head["entry"]), str(head["returns"])
    except (ValueError, KeyError, TypeError):
        return None
    if head.get("sha256") != hashlib.sha256(code).hexdigest():
        return None
    symbols = [symbol, entry] if entry else [symbol]
    library = binding.JITLibraryBuilder().add_object_img(code).add_current_process()
    for one in symbols:
        library = library.export_symbol(one)
    tracker = library.link(_linker(), f"{kernel.name} {next(_number)}")
    addresses = [tracker[one] for one in symbols]
    tracker.detach()
    return Code(kernel.name, addresses[0], returns, key, addresses[1] if entry else 0)
