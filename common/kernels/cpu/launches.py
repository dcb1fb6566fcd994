"""A list of launches, run again in one call: on a CPU, what a CUDA graph is on a GPU.

A decode step of 30 layers makes 270 calls from Python, each of some microseconds, and for each it wants
the interpreter's lock, which the thread that prepares the next step wants too. A `Recording` notes what
a thread launches: which kernel, with which numbers. `replay` then makes the same calls from machine code,
in the same order, over the same memory, without the lock.

What is launched again finds its tensors where they were: memory that a recording asks for comes from an
`Arena`, in which what Python lets go of is used again, as by any allocator; but nobody else gets it.
PyTorch's own operations in between are noted as well, and called again from Python.
"""

import ctypes
import struct
import weakref
from collections.abc import Callable
from functools import cache
from threading import get_ident
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from common.kernels.cpu.jit import KERNELS, LISTENERS, Kernel, int64_array, kernel

HEAD = 3  # words of a launch before its arguments: kind of signature, address, words in all
WORD, STATUS = ir.IntType(64), ir.IntType(32)
RETURNS_NONE = -2  # numba's status of a function that returns None; 0: of others
LINE = 64
CHUNK = 16 << 20  # bytes that an arena asks for at once; those never written take no memory


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


class Launches:
    """Launches that follow each other without anything between them."""

    def __init__(self) -> None:
        self.words: list[int] = []
        self.names: list[str] = []
        self.packed = np.zeros(0, np.int64)

    def add(self, launched: Kernel, arguments: tuple[Any, ...]) -> None:
        signature = launched.dispatcher._cache.signature
        floats = tuple(kind is types.float64 for kind in signature)
        self.words += signatures().index(floats), address_of(launched.name), HEAD + len(arguments)
        for value, is_float in zip(arguments, floats, strict=True):
            [word] = struct.unpack("q", struct.pack("d", value)) if is_float else [int(value)]
            self.words.append(word)
        self.names.append(launched.name)

    def __call__(self) -> None:
        """Raises RuntimeError where one fails."""
        if len(self.packed) != len(self.words):
            self.packed = np.array(self.words, np.int64)
        failed = replay(self.packed.ctypes.data, len(self.names))
        if failed >= 0:
            raise RuntimeError(f"launch {failed} of {len(self.names)} failed: {self.names[failed]}")


class Arena:
    """Memory for what recordings compute, at addresses that stay. One recording at a time; their
    replays take turns, and use the same memory."""

    def __init__(self) -> None:
        self.chunks: list[torch.Tensor] = []
        self.taken: dict[tuple[int, int], int] = {}  # (chunk, begin): end, in bytes

    @property
    def num_bytes(self) -> int:
        return sum(chunk.nbytes for chunk in self.chunks)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor. Its place is free when no tensor is left that lies there."""
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        number, begin = self.find(-(-max(size, 1) // LINE) * LINE)
        array = self.chunks[number].numpy()[begin : begin + size]
        weakref.finalize(array, self.taken.pop, (number, begin), None).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)

    def has(self, x: torch.Tensor) -> bool:
        """Whether a tensor lies here."""
        address = x.untyped_storage().data_ptr()
        begins = [(chunk.data_ptr(), chunk.nbytes) for chunk in self.chunks]
        return any(begin <= address < begin + size for begin, size in begins)

    def find(self, size: int) -> tuple[int, int]:
        """The first place with so many bytes that nobody has, and take it."""
        for number, chunk in enumerate(self.chunks):
            place = 0
            for (_, begin), end in sorted(t for t in self.taken.items() if t[0][0] == number):
                if begin - place >= size:
                    break
                place = end
            if place + size <= len(chunk):
                self.taken[number, place] = place + size
                return number, place
        self.chunks.append(torch.empty(max(CHUNK, size), dtype=torch.uint8))
        return self.find(size)


class Recording(TorchDispatchMode):
    """A context in which what the thread computes is noted; calling it afterwards computes it again.

    Memory asked for meanwhile comes from the arena. What was computed lies where it lay, until the
    next recording or replay over that arena. A tensor that is to be read after each replay must not
    hold its memory, which others would then go without: see `unowned`.
    """

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self.steps: list[Callable[[], None]] = []
        self.is_paused = False

    def __enter__(self) -> "Recording":
        LISTENERS[get_ident()] = self.launched
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        del LISTENERS[get_ident()]

    def __call__(self) -> None:
        for step in self.steps:
            step()

    @property
    def num_launches(self) -> int:
        """Of kernels; the other steps are PyTorch's operations."""
        return sum(len(step.names) for step in self.steps if isinstance(step, Launches))

    def launched(self, what: Kernel, arguments: tuple[Any, ...]) -> None:
        if self.is_paused:
            return
        if not (self.steps and isinstance(self.steps[-1], Launches)):
            self.steps.append(Launches())
        self.steps[-1].add(what, arguments)

    def outside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function of Python now and at each replay. What it computes goes into the tensors
        that it is given."""
        self.steps.append(lambda: function(*arguments))
        self.is_paused = True
        try:
            return function(*arguments)
        finally:
            self.is_paused = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if self.is_paused:
            return func(*args, **kwargs)
        if func is torch.ops.aten.empty.memory_format and kwargs.get("pin_memory") is not True:
            dtype = kwargs.get("dtype") or torch.get_default_dtype()
            return self.arena.take(tuple(args[0]), dtype)
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError(
                "a number was read from a tensor: it would be the same at each replay"
            )
        out = func(*args, **kwargs)
        if not func.is_view:
            args, kwargs = tree_map_only(torch.Tensor, self.to_keep, (args, kwargs))
            self.steps.append(Again(func, args, kwargs, out))
        return out

    def to_keep(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor as a step may keep it."""
        return unowned(x) if self.arena.has(x) else x


class Again:
    """An operation of PyTorch, whose results lie at each replay where they lay."""

    def __init__(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.outputs = list(out) if isinstance(out, list | tuple) else [out]

    def __call__(self) -> None:
        new = self.func(*self.args, **self.kwargs)
        for old, fresh in zip(
            self.outputs, new if isinstance(new, list | tuple) else [new], strict=True
        ):
            if isinstance(old, torch.Tensor) and old.data_ptr() != fresh.data_ptr():
                old.copy_(fresh)


def unowned(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, which does not hold its memory."""
    storage = x.untyped_storage()
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.from_numpy(np.ctypeslib.as_array(memory)).view(x.dtype)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())
