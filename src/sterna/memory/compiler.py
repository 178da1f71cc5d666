"""From Python to object code: all that needs numba."""

import types as python_types
from collections.abc import Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock

from sterna.memory.kernel import CONTIGUOUS, WRITEABLE, Kernel, KernelError, Key, Late, names_in

_RETURNS = {types.int64: "i", types.uint64: "u", types.boolean: "b", types.none: ""}

_WORD = ir.IntType(64)

_dispatchers: dict[Kernel, Any] = {}


def compile_kernel(kernel: Kernel, key: Key) -> tuple[str, str, bytes]:
    """Compile a kernel for these arguments.

    :return: the name of its function, what it returns (`sterna.memory.kernel.Code`), and an object file with that function and
        all that it calls but the C library's
    :raise KernelError: When numba cannot, or makes of it what cannot be called.
    """
    dispatcher = _dispatcher(kernel)
    signature = tuple(_types_of(key))
    try:
        dispatcher.compile(signature)
    except numba.core.errors.NumbaError as error:
        raise KernelError(f"{kernel.name} cannot be compiled: {error}") from error
    compiled = dispatcher.overloads[signature]
    result = compiled.signature.return_type
    returned = list(result) if isinstance(result, types.BaseTuple) else [result]
    codes = [_RETURNS.get(one) for one in returned]
    if None in codes or (len(codes) > 1 and not {"i"}.issuperset(codes)):
        raise KernelError(f"{kernel.name} returns {result}, which compiled code cannot give to Python")
    _check_convention(compiled)
    returns = "".join(code for code in codes if code is not None)
    symbol = compiled.fndesc.llvm_func_name
    if kernel.hook:
        symbol, library = _as_callback(compiled)
    else:
        library = compiled.library
    return symbol, returns, library._get_compiled_object()


@global_compiler_lock
def _as_callback(compiled: Any) -> tuple[str, Any]:
    """A C function of the same arguments around a compiled one: its name, and what holds both."""
    context, description = compiled.target_context, compiled.fndesc
    name = "callback"
    library = context.codegen().create_library(name)
    module = library.create_ir_module(name)
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [_WORD] * len(description.argtypes)), name)
    builder = ir.IRBuilder(function.append_basic_block())
    native = context.declare_function(module, description)
    context.call_conv.call_function(builder, native, description.restype, description.argtypes, function.args)
    builder.ret_void()
    library.add_ir_module(module)
    library.add_linking_library(compiled.library)
    library.enable_object_caching()
    library.finalize()
    return name, library


def _dispatcher(kernel: Kernel) -> Any:
    """What numba makes of the function: a copy of it, in whose names compiled functions stand for kernels."""
    if kernel not in _dispatchers:
        function = kernel.function
        names = dict(function.__globals__)
        for name in names_in(function.__code__):
            called = names.get(name)
            if isinstance(called, Kernel):
                names[name] = _dispatcher(called)
            elif isinstance(called, Late):
                names[name] = called.resolve()
        copy = python_types.FunctionType(
            function.__code__, names, function.__name__, function.__defaults__, function.__closure__
        )
        copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
        _dispatchers[kernel] = numba.njit(
            nogil=True,
            inline="always" if kernel.inline else "never",
            no_cpython_wrapper=True,
            no_cfunc_wrapper=True,
            # Without numba's memory management, which is not there when the code is loaded.
            _nrt=False,
        )(copy)
    return _dispatchers[kernel]


def _types_of(key: Key) -> Iterator[Any]:
    for part in key:
        if part is int or part is bool:
            yield types.int64 if part is int else types.boolean
        elif isinstance(part, tuple):
            dtype, ndim, flags = part
            layout = "C" if flags & CONTIGUOUS else "A"
            yield types.Array(numba.from_dtype(dtype), ndim, layout, readonly=not flags & WRITEABLE)
        else:
            yield numba.from_dtype(part)


def _check_convention(compiled: Any) -> None:
    """Whether numba's functions take what `Code` hands over.

    :raise KernelError: When they do not.
    """
    context, signature = compiled.target_context, compiled.signature
    expected: list[str] = []
    for argument in signature.args:
        if isinstance(argument, types.Array):
            item = context.get_data_type(argument.dtype).as_pointer()
            expected += ["i8*", "i8*", "i64", "i64", str(item), *["i64"] * (2 * argument.ndim)]
        else:
            expected.append("i8" if argument == types.boolean else f"i{argument.bitwidth}")
    function = context.call_conv.get_function_type(signature.return_type, signature.args)
    found = [str(argument) for argument in function.args]
    if str(function.return_type) != "i32" or found[2:] != expected:
        raise KernelError(f"this numba's calling convention is not the known one: {function}")
