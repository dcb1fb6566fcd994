"""How the CPU kernels are compiled, and given their memory.

Kernels take addresses and sizes, all plain numbers: marshalling a tensor as an array costs about a
microsecond, an address a tenth of it, and a decode step makes some 270 calls. So there is one
signature a kernel, known before the first call, and it is compiled once for good (see `cache`).

Kernels hold the interpreter's lock: they are short, and a lock let go 270 times a step is waited
for 270 times when another Python thread is busy.
"""

import os
from collections.abc import Callable
from functools import partial
from threading import get_ident
from typing import Any

# How often an idle worker of GNU's OpenMP, which is PyTorch's, looks for work before it sleeps: some 70
# microseconds. By default it does so for milliseconds, and the kernels' own workers want the cores.
# Read when that library is loaded, so set before.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import llvmlite.binding as llvm
import numba
from numba import carray, types
from numba.extending import intrinsic

from common.kernels.cpu.cache import KernelCache

FEATURES = llvm.get_host_cpu_features() if not numba.config.CPU_NAME else {}
KERNELS: dict[str, Any] = {}  # name: numba's dispatcher, in the order of definition
# By a thread's number: who notes what this thread launches (see `launches`).
LISTENERS: dict[int, Callable[["Kernel", tuple[Any, ...]], None]] = {}


class Kernel:
    """A compiled function, as Python calls it."""

    __slots__ = ("dispatcher", "name")

    def __init__(self, dispatcher: Any) -> None:
        self.dispatcher, self.name = dispatcher, dispatcher.py_func.__name__

    def __call__(self, *arguments: float) -> Any:
        if LISTENERS and (listener := LISTENERS.get(get_ident())) is not None:
            listener(self, arguments)
        return self.dispatcher(*arguments)


def kernel(
    function: Callable | None = None,
    *,
    exact: bool = False,
    floats: tuple[str, ...] = (),
    nogil: bool = False,
) -> Callable:
    """Compile a function that Python calls, and keep it on disk.

    exact: keep to IEEE arithmetic (infinities, NaN, order of operations).
    floats: the parameters that are floats; all others are integers.
    nogil: whether it lets go of the interpreter's lock, since it may sleep.
    """
    if function is None:
        return partial(kernel, exact=exact, floats=floats, nogil=nogil)
    dispatcher = numba.njit(function, nogil=nogil, fastmath=not exact, error_model="numpy")
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    assert set(floats) <= set(names), f"{function.__name__}: {floats} of {names}"
    signature = tuple(types.float64 if name in floats else types.int64 for name in names)
    dispatcher._cache = KernelCache(function.__name__, signature)
    assert function.__name__ not in KERNELS, f"two kernels are called {function.__name__}"
    KERNELS[function.__name__] = dispatcher
    return Kernel(dispatcher)


def helper(function: Callable | None = None, *, exact: bool = False) -> Callable:
    """Compile a function that kernels call; its code becomes part of theirs."""
    if function is None:
        return lambda function: helper(function, exact=exact)
    return numba.njit(
        function,
        fastmath=not exact,
        error_model="numpy",
        no_cpython_wrapper=True,
        no_cfunc_wrapper=True,
    )


def _pointer(element: types.Type) -> Callable:
    @intrinsic
    def pointer(typing_context, address):
        def codegen(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.intp), codegen

    return pointer


_byte_pointer = _pointer(types.uint8)
_float32_pointer = _pointer(types.float32)
_int32_pointer = _pointer(types.int32)
_int64_pointer = _pointer(types.int64)


@helper
def float32_array(address, shape):
    """A C-contiguous float32 array of that shape, at that address."""
    return carray(_float32_pointer(address), shape)


@helper
def int32_array(address, shape):
    return carray(_int32_pointer(address), shape)


@helper
def byte_array(address, shape):
    return carray(_byte_pointer(address), shape)


@helper
def int64_array(address, shape):
    return carray(_int64_pointer(address), shape)


@intrinsic
def next_index(typing_context, address):
    """Add one to the int64 at an address, atomically, and return what was there.

    Threads draw their next piece of work with it, so that one slowed by another process gets less.
    """

    def codegen(context, builder, signature, args):
        place = builder.inttoptr(args[0], context.get_value_type(types.int64).as_pointer())
        one = context.get_constant(types.int64, 1)
        return builder.atomic_rmw("add", place, one, "monotonic")

    return types.int64(types.intp), codegen
