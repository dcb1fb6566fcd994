"""What a thread computes on a CPU, noted while it does, and computed again from the note.

A `Recording` notes which kernels are launched (`common.kernels.cpu.launches` repeats them in one call) and
which operations of PyTorch run between them, which are called again from Python. What is repeated finds
its tensors at the same addresses: memory that is asked for meanwhile comes from an `Arena`, in which
the place of a tensor that Python has let go of is used again, as by any allocator.
"""

import contextlib
import ctypes
import math
import weakref
from collections.abc import Callable, Iterator
from threading import get_ident
from typing import Any

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from common.kernels.cpu.jit import LISTENERS, Kernel
from common.kernels.cpu.launches import Launches

LINE = 64
CHUNK = 16 << 20  # bytes that an arena asks for at once; those never written take no memory
# Operations whose result depends on numbers in a tensor in more than its numbers.
READING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class CannotRecordError(RuntimeError):
    """What was computed would be another thing each time."""


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
        size = math.prod(shape) * dtype.itemsize
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
        """The first place with so many bytes that is free, from now on taken."""
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
    """See `record`. Calling it computes again what was noted. Results lie where they lay, until the next
    recording or replay over the same arena."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Whether PyTorch hides this class from its compiler, which it then loads: 3 s, in the middle
        of a step. Nothing compiled runs while a recording is made."""
        return False

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena
        self.steps: list[Callable[[], None]] = []
        self.is_paused = False

    def __call__(self) -> None:
        for step in self.steps:
            step()

    @property
    def num_launches(self) -> int:
        """Of kernels; the other steps are called from Python."""
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
        kept = tree_map_only(torch.Tensor, self.to_keep, arguments)
        self.steps.append(lambda: function(*kept))
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
        # In inference mode operations that are made of others arrive whole, and some of these are views
        # by their name and copy.
        with self:
            out = func.decompose(*args, **kwargs)
        if out is not NotImplemented:
            return out
        if READING & set(func.tags) and not is_index(func, args):
            raise CannotRecordError(f"{func} depends on numbers in a tensor")
        out = func(*args, **kwargs)
        if func.is_view:
            return out
        return self.note(func, args, kwargs, out)

    def note(self, func: Any, args: Any, kwargs: Any, out: Any) -> Any:
        """Keep an operation of PyTorch. Returns what it gave, in the arena unless it lay somewhere."""
        given = {
            x.untyped_storage().data_ptr() for x in torch.utils._pytree.tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }  # fmt: skip

        def placed(x: torch.Tensor) -> torch.Tensor:
            if x.untyped_storage().data_ptr() in given:
                return x
            return self.arena.take(tuple(x.shape), x.dtype).copy_(x)

        out = tree_map_only(torch.Tensor, placed, out)
        args, kwargs, kept = tree_map_only(torch.Tensor, self.to_keep, (args, kwargs, out))
        self.steps.append(Again(func, args, kwargs, kept))
        return out

    def to_keep(self, x: torch.Tensor) -> torch.Tensor:
        """A tensor as a step may keep it."""
        return unowned(x) if self.arena.has(x) else x


def is_index(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation looks up places that are told by their numbers, and not by a mask."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(x is None or x.dtype not in (torch.bool, torch.uint8) for x in args[1])


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


def record(arena: Arena, run: Callable[[], torch.Tensor]) -> tuple[Recording, torch.Tensor]:
    """Run a function of this thread and note what it computes. Returns the note, and the result as
    it lies there after each replay: it does not hold its memory. Raises CannotRecordError."""
    recording = Recording(arena)
    LISTENERS[get_ident()] = recording.launched
    try:
        with recording:
            return recording, unowned(run())
    finally:
        del LISTENERS[get_ident()]


class _NoReference:
    """In the place of reference operations, which look into tensors as they like."""

    def __getattr__(self, name: str) -> Any:
        raise CannotRecordError(f"{name} runs as the reference does")


@contextlib.contextmanager
def without_reference(ops: Any) -> Iterator[None]:
    """A context in which a CPU's operations raise CannotRecordError where they would turn to the
    reference's: an element read there (`tolist`) is seen by nobody."""
    reference, ops.reference = ops.reference, _NoReference()
    try:
        yield
    finally:
        ops.reference = reference


def unowned(x: torch.Tensor) -> torch.Tensor:
    """The same tensor, which does not hold its memory."""
    storage = x.untyped_storage()
    memory = (ctypes.c_uint8 * storage.nbytes()).from_address(storage.data_ptr())
    whole = torch.from_numpy(np.ctypeslib.as_array(memory)).view(x.dtype)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())
