"""Finds, on a CPU, what would make the host wait for a GPU.

An asynchronous step launches work and goes on; one operation that needs a number from the GPU, or that
copies from ordinary memory to it, makes the host wait until all work before it is done. On a CPU the
same code works just as well, so nothing shows. Inside `NoSyncs` such operations raise:

    with NoSyncs():
        runner.run(batch)

Seen are: reading a number (`item`, `bool`, `tolist`, `numpy`), results whose size depends on numbers
(`nonzero`, boolean masks as indices, `repeat_interleave` without `output_size`), tensors made from
Python's or numpy's numbers (`torch.tensor`, lists as indices), blocking copies to a named device. Not
seen: copies by `copy_` from memory that is not pinned, since all tensors are on the CPU here.

What `common.kernels` does is left alone: on a GPU its kernels do it. So is `common.device.to_device`,
which does not wait. Only the calling thread is watched.
"""

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
NUMBERS_READ = {aten._local_scalar_dense, aten.equal, aten.is_nonzero, aten.item}
SIZES_READ = {
    aten.nonzero,
    aten.nonzero_numpy,
    aten.masked_select,
    aten.argwhere,
    aten.bincount,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index}
MASKS = (torch.bool, torch.uint8)
READING = (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.cpu, Tensor.item)
MAKING = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy)


class Synchronizes(AssertionError):
    """An operation that waits for the GPU, and where it was called."""


class NoSyncs:
    """A context in which operations that would wait for a GPU raise `Synchronizes`."""

    def __init__(self) -> None:
        self.modes = (Functions(), Operations())

    def __enter__(self) -> "NoSyncs":
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*exception)


class Functions(TorchFunctionMode):
    """What is only to be seen as it is called: for a CPU nothing is left of it further down."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        named = named or {}
        if function in READING:
            complain(f"{function.__name__} reads from the GPU")
        if function in MAKING:
            complain(f"torch.{function.__name__} copies from memory that is not pinned")
        if function is Tensor.to and is_blocking_copy(*arguments[1:], **named):
            complain("a copy to a device without non_blocking")
        return function(*arguments, **named)


def is_blocking_copy(*arguments: Any, non_blocking: bool = False, **named: Any) -> bool:
    """Whether `Tensor.to` is given a device, and may wait for the copy."""
    has_device = any(isinstance(x, torch.device | str) for x in (*arguments, *named.values()))
    has_flag = non_blocking or any(x is True for x in arguments)
    return has_device and not has_flag


class Operations(TorchDispatchMode):
    """What PyTorch's functions are made of."""

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        named = named or {}
        packet = operation.overloadpacket
        if packet in NUMBERS_READ:
            complain(f"{packet.__name__} needs a number from the GPU")
        if packet in SIZES_READ:
            complain(f"{packet.__name__} has a size that only the GPU knows")
        if packet is aten.where and len(arguments) == 1:
            complain("where without values has a size that only the GPU knows")
        if packet is aten.repeat_interleave and named.get("output_size") is None:
            complain("repeat_interleave without output_size has a size that only the GPU knows")
        if packet in INDEXING and any(x is not None and x.dtype in MASKS for x in arguments[1]):
            complain("a boolean mask as index has a size that only the GPU knows")
        if packet is aten.lift_fresh and arguments[0].dim() > 0:
            complain("numbers of Python or numpy are copied from memory that is not pinned")
        return operation(*arguments, **named)


def complain(what: str) -> None:
    """Raise, unless something that is left alone has called it."""
    frame: FrameType | None = sys._getframe(1)
    caller = None
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        code = frame.f_code
        if module.startswith("common.kernels") or code.co_name == "to_device":
            return
        if caller is None and not module.startswith(("torch", "common.testing.no_syncs")):
            caller = f"{code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    raise Synchronizes(f"{what}, at {caller}")
