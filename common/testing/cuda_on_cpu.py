"""A GPU that is not there, so that what is written for one can be run without it.

`install()` makes PyTorch claim GPUs. Their tensors lie on the CPU and are marked: they tell a CUDA
device, mixing them with the host's is an error as it would be, and under PyTorch's guard against
waiting (`torch.cuda.set_sync_debug_mode`) so is what would wait: reading a value, a copy that is
not `non_blocking`, an index that is a list or a mask. A CUDA graph is the list of operations that
ran while it was captured, and runs them again over the same memory. In the place of Triton's
kernels the CPU's compute: what lies around them is what runs here.

Only threads that enter `OnCpu` have these GPUs. What they cannot show: speed, memory, and what CUDA
itself refuses.
"""

import importlib
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile

SYNC = "called a synchronizing CUDA operation"  # as PyTorch says it

T = torch.Tensor
READ = {
    T.item, T.tolist, T.numpy, T.__bool__, T.__int__, T.__float__, T.__index__, T.nonzero,
    torch.nonzero, torch.argwhere, torch.unique, torch.masked_select, T.masked_select, T.unique,
    torch.equal, T.equal, torch.allclose, torch.bincount, T.bincount,
}  # fmt: skip
REPEAT = {torch.repeat_interleave, T.repeat_interleave}
# These take tensors of both sides.
MOVING = {T.to, T.cpu, T.cuda, T.copy_, T.__getitem__, T.__setitem__, T.type, T.__deepcopy__}


def is_cuda(device: Any) -> bool:
    return isinstance(device, str | torch.device) and str(device).partition(":")[0] == "cuda"


class Gpu(threading.local):
    """What a thread knows of its GPUs."""

    used: ClassVar[set[int]] = set()  # by any thread: those that a context would have been made on

    def __init__(self) -> None:
        self.current = 0
        self.guard = "default"
        self.recorder: Any = None  # of the graph that is being captured

    def wait(self, what: str) -> None:
        """A call that waits for the GPU."""
        if self.guard == "error" or self.recorder is not None:
            raise RuntimeError(f"{SYNC}: {what}")

    def touch(self, device: Any = None) -> int:
        """The index of a device, which has a context from now on."""
        if isinstance(device, int):
            index = device
        else:
            named = None if device is None else torch.device(device).index
            index = self.current if named is None else named
        self.used.add(index)
        return index

    def pin(self) -> None:
        """Pinned memory is had through any context that is there already."""
        if not self.used:
            self.touch()


GPU = Gpu()


def mark_of(x: Any) -> int | None:
    """The GPU that a tensor claims to lie on."""
    return x.__dict__.get("_gpu")


def marked(x: torch.Tensor, index: int | None) -> torch.Tensor:
    x.__dict__["_gpu"] = index
    return x


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


class OnCpu(TorchFunctionMode):
    """Every call of PyTorch, with the CPU in the GPU's place."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        mark = None if first is None else mark_of(first)
        if func == T.device.__get__:
            return func(first) if mark is None else torch.device("cuda", mark)
        if func == T.is_cuda.__get__:
            return mark is not None
        if func is T.get_device:
            return -1 if mark is None else mark
        if func in (T.to, T.cpu, T.cuda):
            return self.move(func, first, mark, args[1:], kwargs)
        if func is torch.device:
            return func(*args, **kwargs)
        if func is T.pin_memory:
            GPU.pin()
            return first
        wanted = [v for v in (*args, *kwargs.values()) if is_cuda(v)]
        index = GPU.touch(wanted[0]) if wanted else None
        if wanted:
            args = tuple("cpu" if is_cuda(v) else v for v in args)
            kwargs = {key: "cpu" if is_cuda(v) else v for key, v in kwargs.items()}
        if kwargs.pop("pin_memory", False):
            if func in (torch.tensor, torch.as_tensor) and isinstance(args[0], np.ndarray):
                raise RuntimeError("Can't pin tensor constructed from numpy")
            GPU.pin()
        given = list(tensors_in([*args, *kwargs.values()]))
        marks = {mark_of(x) for x in given if not isinstance(x, torch.nn.Parameter) and x.dim()}
        self.check(func, args, kwargs, marks, index)
        out = func(*args, **kwargs)
        if index is None:
            index = next((mark_of(x) for x in given if mark_of(x) is not None), None)
        for x in tensors_in(out):
            if mark_of(x) is None and index is not None:
                marked(x, index)
        return out

    def check(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], marks: set[Any], index: Any
    ) -> None:
        """Raise what the GPU would."""
        name = getattr(func, "__name__", str(func))
        on_gpu = marks - {None}
        is_sized = func in REPEAT and isinstance(args[1], T) and "output_size" not in kwargs
        is_read = (func in READ or is_sized) and any(
            mark_of(x) is not None for x in tensors_in(args)
        )
        if is_read and func is not T.numpy:
            GPU.wait(name)
        if is_read and func is T.numpy:
            raise TypeError("can't convert a CUDA tensor to numpy")
        if func in (torch.tensor, torch.as_tensor) and index is not None:
            GPU.wait(f"{name} with a device")
        if func is T.copy_ and len(marks) > 1 and not kwargs.get("non_blocking"):
            GPU.wait("copy_ from the other side")
        if func in (T.__getitem__, T.__setitem__) and mark_of(args[0]) is not None:
            for part in args[1] if isinstance(args[1], tuple) else (args[1],):
                if isinstance(part, list) or (
                    isinstance(part, torch.Tensor)
                    and (part.dtype == torch.bool or (mark_of(part) is None and part.dim()))
                ):
                    GPU.wait(f"an index that is a {type(part).__name__}, or a mask")
        if func not in MOVING and (len(on_gpu) > 1 or (on_gpu and None in marks)):
            places = sorted("cpu" if m is None else f"cuda:{m}" for m in marks)
            raise RuntimeError(f"{name}: expected all tensors to be on the same device: {places}")

    def move(
        self, func: Any, x: torch.Tensor, mark: int | None, args: tuple[Any, ...], kwargs: Any
    ) -> torch.Tensor:
        """`to`, `cpu` and `cuda`."""
        target: Any = {T.cpu: "cpu", T.cuda: "cuda"}.get(func)
        flags = iter(("non_blocking", "copy"))
        for value in args:
            if isinstance(value, torch.Tensor):
                target, kwargs["dtype"] = value.device, value.dtype
            elif isinstance(value, torch.dtype):
                kwargs["dtype"] = value
            elif isinstance(value, bool):
                kwargs[next(flags)] = value
            elif value is not None:
                target = value
        target = kwargs.pop("device", target)
        if target is None:  # where it is
            out = T.to(x, **kwargs)
            return out if out is x else marked(out, mark)
        goal = GPU.touch(target) if is_cuda(target) else None
        if goal != mark and not kwargs.get("non_blocking"):
            GPU.wait("a copy to the other side")
        out = T.to(x, device="cpu" if is_cuda(target) else target, **kwargs)
        if goal == mark:
            return out if out is x else marked(out, mark)
        return marked(out.clone() if out.data_ptr() == x.data_ptr() else out, goal)


def install() -> None:
    """For the rest of this process."""
    from common.testing import cuda_stand_ins as stand_ins

    for name, value in stand_ins.REPLACED.items():
        assert hasattr(torch.cuda, name), name
        setattr(torch.cuda, name, value)
    torch.Generator = stand_ins.Generator  # type: ignore[misc]
    torch.profiler.profile = lambda activities=(), **options: profile(
        activities=[ProfilerActivity.CPU], **options
    )
    triton_ops = importlib.import_module("common.kernels.triton.ops")
    triton_ops.TritonOps = stand_ins.ops_class()
    OnCpu().__enter__()
