"""Launches that cost the host little.

`kernel[grid](…)` binds the arguments by name, looks at each of them for what is compiled in, and
makes a key of all that, in every launch: some 20 µs of Python, five times a layer, while a small
batch takes the GPU less. Here the key is what a variant can depend on: the constants, the formats
of the tensors, and the GPU. Nothing else may: kernels do not specialise on numbers, and a tensor
that does not begin at a multiple of 16 bytes is launched Triton's own way.
"""

from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime.jit import JITFunction

ALIGNMENT = 16  # bytes


class Launcher:
    """One kernel's launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.is_compiled = isinstance(kernel, JITFunction)  # else the interpreter runs it
        self.variants: dict[Any, Any] = {}  # key -> what Triton has compiled

    def __call__(
        self,
        grid: tuple[int, ...],
        arguments: tuple[Any, ...],
        constants: tuple[Any, ...],
        num_warps: int = 4,
        num_stages: int = 3,
    ) -> None:
        """Launch the kernel on the current GPU.

        arguments, constants: in the kernel's own order, the constants last. A None among the
        arguments is compiled in, too.
        """
        formats, addresses = [], 0
        for argument in arguments:
            if isinstance(argument, Tensor):
                formats.append(argument.dtype)
                addresses |= argument.data_ptr()
            else:
                formats.append(argument is None)
        index = arguments[0].get_device()
        key = (constants, tuple(formats), index, num_warps, num_stages)
        variant = self.variants.get(key)
        is_plain = knobs.runtime.launch_enter_hook is None and addresses % ALIGNMENT == 0
        if variant is None or not is_plain:
            variant = self.kernel[grid](
                *arguments, *constants, num_warps=num_warps, num_stages=num_stages
            )
            if self.is_compiled and is_plain:
                self.variants[key] = variant
            return
        stream = torch._C._cuda_getCurrentRawStream(index)
        variant.run(
            *grid, *(1,) * (3 - len(grid)), stream, variant.function, variant.packed_metadata,
            None, None, None, *arguments, *constants,
        )  # fmt: skip
