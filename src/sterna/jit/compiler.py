"""From Python to object code: all that needs numba."""

import functools
import types as python_types
from collections.abc import Callable, Iterator
from typing import Any

import numba
from llvmlite import ir
from numba import types
from numba.core.compiler_lock import global_compiler_lock

from sterna.jit.machinecode import MISFIT, ArrayHead
from sterna.jit.source import CONTIGUOUS, WRITEABLE, KernelError, KernelSource, Key, Late, names_in

_RETURNS = {types.int64: "i", types.uint64: "u", types.boolean: "b", types.none: ""}

_WORD, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)

_CALLBACK, _ENTRY = "callback", "entry"

_dispatchers: dict[KernelSource, Any] = {}


def compile_kernel(kernel: KernelSource, key: Key) -> tuple[dict[str, str], bytes]:
    """Compile a kernel for these arguments.

    :return: what `sterna.jit.machinecode.Code` asks for: the names of its function (``symbol``) and of its entry (``entry``,
        empty without one), and what it ``returns``; and an object file with these and all that they call but the C library's
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
    names = {"symbol": compiled.fndesc.llvm_func_name, "entry": "", "returns": returns}
    library = compiled.library
    if kernel.hook:
        names["symbol"] = _CALLBACK
        library = _around(compiled, _write_callback)
    elif kernel.ahead:
        names["entry"] = _ENTRY
        library = _around(compiled, functools.partial(_write_entry, key))
    return names, library._get_compiled_object()


@global_compiler_lock
def _around(compiled: Any, write: Callable[[Any, Any], None]) -> Any:
    """A C function around a compiled one: what holds both."""
    library = compiled.target_context.codegen().create_library(compiled.fndesc.qualname)
    module = library.create_ir_module(compiled.fndesc.qualname)
    write(compiled, module)
    library.add_ir_module(module)
    library.add_linking_library(compiled.library)
    library.enable_object_caching()
    library.finalize()
    return library


def _write_callback(compiled: Any, module: Any) -> None:
    """A function of the same arguments, which returns nothing."""
    context, description = compiled.target_context, compiled.fndesc
    function = ir.Function(
        module, ir.FunctionType(ir.VoidType(), [_WORD] * len(description.argtypes)), _CALLBACK
    )
    builder = ir.IRBuilder(function.append_basic_block())
    native = context.declare_function(module, description)
    context.call_conv.call_function(builder, native, description.restype, description.argtypes, function.args)
    builder.ret_void()


def _write_entry(key: Key, compiled: Any, module: Any) -> None:
    """A function that takes arrays as they are, and looks whether they are what they should be.

    See `sterna.jit.machinecode.Code`; `_check_convention` has seen how the compiled function takes its arguments.
    """
    native = compiled.target_context.declare_function(module, compiled.fndesc)
    pointer = _BYTE.as_pointer()
    kinds = [pointer if isinstance(part, tuple) else _WORD for part in key]
    function = ir.Function(module, ir.FunctionType(_INT, [pointer, _WORD.as_pointer(), *kinds]), _ENTRY)
    result, known, *arguments = function.args
    builder = ir.IRBuilder(function.append_basic_block())
    misfit = function.append_basic_block()

    def load(base: Any, offset: int, kind: Any) -> Any:
        at = builder.gep(base, [ir.Constant(_WORD, offset)])
        return builder.load(builder.bitcast(at, kind.as_pointer()))

    def demand(found: Any, wanted: Any) -> None:
        fits = function.append_basic_block()
        builder.cbranch(builder.icmp_unsigned("==", found, wanted), fits, misfit)
        builder.position_at_end(fits)

    def known_at(index: int) -> Any:
        return builder.load(builder.gep(known, [ir.Constant(_WORD, index)]))

    taken: list[Any] = []
    arrays = 0
    for part, argument in zip(key, arguments, strict=True):
        if not isinstance(part, tuple):
            taken.append(builder.trunc(argument, ir.IntType(8)) if part is bool else argument)
            continue
        dtype, ndim, flags = part
        arrays += 1
        wanted = ir.Constant(_INT, flags)
        demand(load(argument, ArrayHead.type.offset, _WORD), known_at(0))
        demand(load(argument, ArrayHead.dtype.offset, _WORD), known_at(arrays))
        demand(load(argument, ArrayHead.ndim.offset, _INT), ir.Constant(_INT, ndim))
        demand(builder.and_(load(argument, ArrayHead.flags.offset, _INT), wanted), wanted)
        shape, strides = (
            [load(load(argument, offset, pointer), 8 * i, _WORD) for i in range(ndim)]
            for offset in (ArrayHead.shape.offset, ArrayHead.strides.offset)
        )
        size = functools.reduce(builder.mul, shape, ir.Constant(_WORD, 1))
        data = load(argument, ArrayHead.data.offset, pointer)
        taken += [None, None, size, ir.Constant(_WORD, dtype.itemsize), data, *shape, *strides]
    exception = builder.alloca(pointer)
    words = [result, exception, *taken]
    kinds = [one.type for one in native.args]
    status = builder.call(
        native,
        [
            ir.Constant(kind, None) if word is None else builder.bitcast(word, kind)
            for word, kind in zip(words, kinds, strict=True)
        ],
        # It is called by itself as well, and would be there twice.
        attrs=("noinline",),
    )
    builder.ret(status)
    builder.position_at_end(misfit)
    builder.ret(ir.Constant(_INT, MISFIT))


def _dispatcher(kernel: KernelSource) -> Any:
    """What numba makes of the function: a copy of it, in whose names compiled functions stand for kernels."""
    if kernel not in _dispatchers:
        function = kernel.function
        names = dict(function.__globals__)
        for name in names_in(function.__code__):
            called = names.get(name)
            if isinstance(called, KernelSource):
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
