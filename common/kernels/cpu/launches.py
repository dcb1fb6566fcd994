"""A list of launches, run again in one call: on a CPU, what a CUDA graph is on a GPU.

A decode step of 30 layers makes 270 calls from Python, each of some microseconds, and for each it wants
the interpreter's lock, which the thread that prepares the next step wants too. `Launches` holds which
kernels are to be called, with which arguments; `replay` calls them from machine code, in that order,
without the lock. `common.kernels.recording` notes them.
"""

import struct
from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from common.kernels.cpu.jit import KERNELS, Kernel, int64_array, kernel

HEAD = 3  # words of a launch before its arguments: kind of signature, address, words in all
WORD, STATUS = ir.IntType(64), ir.IntType(32)
RETURNS_NONE = -2  # numba's status of a function that returns None; 0: of others


@cache
def signatures() -> list[tuple[bool, ...]]:
    """Of all kernels, each once and always in the same order: which of the arguments are floats."""
    kinds = {tuple(kind is types.float64 for kind in k._cache.signature) for k in KERNELS.values()}
    return sorted(kinds, key=lambda kind: (len(kind), kind))


@intrinsic
def launch(typing_context, kind, address, arguments):
    """Call a kernel by its address, with arguments that lie in memory. Returns numba's status."""

    def codegen(context, builder, signature, args):
        kind, address, arguments = args
        result = cgutils.alloca_once(builder, WORD)  # of whatever it returns
        problem = cgutils.alloca_once(builder, WORD)
        status = cgutils.alloca_once_value(builder, STATUS(1))
        values = builder.inttoptr(arguments, WORD.as_pointer())
        end = builder.append_basic_block("end")
        switch = builder.switch(kind, end)
        for number, floats in enumerate(signatures()):
            block = builder.append_basic_block(f"kind_{number}")
            switch.add_case(WORD(number), block)
            builder.position_at_end(block)
            given = []
            for place, is_float in enumerate(floats):
                value = builder.load(builder.gep(values, [WORD(place)]))
                given.append(builder.bitcast(value, ir.DoubleType()) if is_float else value)
            kinds = [result.type, problem.type, *(value.type for value in given)]
            function = builder.inttoptr(address, ir.FunctionType(STATUS, kinds).as_pointer())
            builder.store(builder.call(function, [result, problem, *given]), status)
            builder.branch(end)
        builder.position_at_end(end)
        return builder.sext(builder.load(status), WORD)

    return types.int64(types.int64, types.int64, types.int64), codegen


@kernel(nogil=True)
def replay(words, num_launches):
    """Returns -1, or which launch has failed."""
    place = words
    for number in range(num_launches):
        head = int64_array(place, (HEAD,))
        status = launch(head[0], head[1], place + HEAD * 8)
        if status != 0 and status != RETURNS_NONE:
            return number
        place += head[2] * 8
    return -1


@cache
def address_of(name: str) -> int:
    """Where a kernel's machine code begins."""
    dispatcher = KERNELS[name]
    signature = dispatcher._cache.signature
    dispatcher.compile(signature)
    result = dispatcher.overloads[signature]
    return result.library.get_pointer_to_function(result.fndesc.llvm_func_name)


@cache
def head_of(launched: Kernel) -> tuple[int, int, tuple[int, ...]]:
    """Its kind of signature, its address, and which of its arguments are floats."""
    floats = tuple(kind is types.float64 for kind in launched.dispatcher._cache.signature)
    places = tuple(place for place, is_float in enumerate(floats) if is_float)
    return signatures().index(floats), address_of(launched.name), places


class Launches:
    """Launches that follow each other without anything between them."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.names: list[str] = []
        self.packed = np.zeros(0, np.int64)

    def add(self, launched: Kernel, arguments: tuple[Any, ...]) -> None:
        kind, address, places_of_floats = head_of(launched)
        words = [kind, address, HEAD + len(arguments), *map(int, arguments)]
        for place in places_of_floats:
            [words[HEAD + place]] = struct.unpack("q", struct.pack("d", arguments[place]))
        self.words += words
        self.names.append(launched.name)

    def __call__(self) -> None:
        """Raises RuntimeError where one fails."""
        if len(self.packed) != len(self.words):
            self.packed = np.array(self.words, np.int64)
        failed = replay(self.packed.ctypes.data, len(self.names))
        if failed >= 0:
            raise RuntimeError(f"launch {failed} of {len(self.names)} failed: {self.names[failed]}")
