"""Launches that cost the host little.

`kernel[grid](...)` binds the arguments by name, looks at each of them for what is compiled in, and
makes a key of all that in every launch: 8 to 20 us of Python, five or six times a layer, while a small
batch keeps the GPU busy for less. Here the key is what a variant can depend on: the constants, the
formats of the tensors, the GPU. Nothing else may: kernels specialise on no number, and a tensor that
does not begin at a multiple of 16 bytes is launched Triton's own way, as are all launches while a
profiler listens to Triton.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes
# PyTorch's own functions, without the checks around them.
current_device = getattr(torch._C, "_cuda_getDevice", lambda: -1)
current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


class Launcher:
    """One kernel's launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.is_compiled = isinstance(kernel, JITFunction)  # else the interpreter runs it
        # By parameter, for those that a variant depends on: whether it begins at a multiple.
        self.is_aligned = [
            not (self.is_compiled and parameter.do_not_specialize_on_alignment)
            for parameter in getattr(kernel, "params", [])
        ]
        # Key -> what Triton has compiled: its launch function, its handle, its metadata.
        self.variants: dict[tuple[Any, ...], tuple[Any, Any, Any]] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        """Launch the kernel on the first argument's GPU.

        arguments, constants: in the kernel's own order, the constants last. A None among the
        arguments is compiled in, too. Integers are below 2**31.
        """
        device = arguments[0].get_device()
        if device >= 0 and device != current_device():
            with torch.cuda.device(device):
                return self(grid, arguments, constants, num_warps, num_stages)
        if not self.is_compiled:
            self.kernel[grid](*arguments, *constants, num_warps=num_warps, num_stages=num_stages)
            return None
        values, formats, addresses = [], [], 0
        for argument, is_aligned in zip(arguments, self.is_aligned, strict=False):
            if isinstance(argument, Tensor):
                address = argument.data_ptr()
                formats.append(argument.dtype)
                values.append(address)  # which the launch function takes as it is
                if is_aligned:
                    addresses |= address
            else:
                formats.append(argument is None)
                values.append(argument)
        key = (constants, tuple(formats), device, num_warps, num_stages)
        variant = self.variants.get(key)
        is_plain = addresses % ALIGNMENT == 0 and not knobs.runtime.launch_enter_hook.calls
        if variant is None or not is_plain:
            self.check_integers(arguments)
            compiled = self.kernel[grid](
                *arguments, *constants, num_warps=num_warps, num_stages=num_stages
            )
            if is_plain:
                self.variants[key] = (compiled.run, compiled.function, compiled.packed_metadata)
            return None
        run, function, metadata = variant
        width, height, depth = (*grid, 1, 1)[:3]
        stream = current_stream(device)
        hooks = (None, None, None)
        run(width, height, depth, stream, function, metadata, *hooks, *values, *constants)
        return None

    def check_integers(self, arguments: tuple[Any, ...]) -> None:
        """No variant may depend on a number: what was compiled for one would be run with another."""
        for parameter, argument in zip(self.kernel.params, arguments, strict=False):
            is_free = parameter.do_not_specialize or not isinstance(argument, int)
            assert is_free, f"{self.kernel.__name__} specialises on {parameter.name}"
