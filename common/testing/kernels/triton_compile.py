"""Compile the GPU's kernels for GPUs that are not there, with the arguments that launches give them.

Triton's interpreter runs kernels as Python and so passes much that its compiler refuses: values whose
type changes in a loop, tiles that do not fit into shared memory. Here the wrappers run on small CPU
tensors, each launch is compiled down to machine code, and nothing is executed.

`python -m common.testing.kernels.triton_compile ARCHITECTURE DTYPE [HEAD_DIM ...]` prints a line of JSON for
each kernel. TRITON_INTERPRET must not be set.
"""

import importlib
import json
import re
import sys
from dataclasses import asdict, dataclass, field
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from common.kernels.triton.attention import Device
from common.kernels.triton.ops import TritonOps
from common.testing.kernels.attention_cases import DECODE, MIXED, Spec, make_attention
from common.testing.kernels.case import Target
from common.testing.kernels.sampler_cases import columns, drawn

KERNELS = {  # where launches find them
    "common.kernels.triton.elementwise": (
        "norm_kernel",
        "silu_and_mul_kernel",
        "rotary_and_store_kernel",
    ),
    "common.kernels.triton.attention": ("attention_kernel", "combine_kernel"),
    "common.kernels.triton.sampler": (
        "extremes_kernel",
        "threshold_kernel",
        "noisy_kernel",
        "winner_kernel",
    ),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Architecture:
    capability: int
    shared_memory: int  # bytes a program may have

    @property
    def device(self) -> Device:
        return Device(self.shared_memory, 3 * 100, self.capability >= 90)


ARCHITECTURES = {
    "A100": Architecture(80, 163 << 10),
    "RTX 4090": Architecture(89, 99 << 10),
    "H100, H200": Architecture(90, 227 << 10),
}


@dataclass(frozen=True)
class Compiled:
    kernel: str
    is_decode: bool
    shared: int  # bytes
    allowed: int
    num_async_copies: int  # of 16 bytes each
    num_warpgroup_products: int  # Hopper's matrix products


@dataclass
class Compiler:
    """In the place of a kernel: `compiler[grid](*args, **options)` compiles and keeps the result."""

    kernel: Any
    target: Architecture
    done: list[Compiled] = field(default_factory=list)

    def __getitem__(self, grid: tuple[int, ...]):
        assert all(size > 0 for size in grid), grid
        return self.compile

    def compile(self, *args: Any, num_warps: int = 4, num_stages: int = 3, **named: Any) -> None:
        parameters = self.kernel.params
        values = dict(zip([p.name for p in parameters], args, strict=False)) | named
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(parameters):
            value = values[parameter.name]
            kind = type_of(value, parameter)
            signature[parameter.name] = kind
            if kind == "constexpr":
                constants[(place,)] = value
            elif is_divisible(value, parameter):
                attributes[(place,)] = [["tt.divisibility", 16]]
        source = ASTSource(self.kernel, signature, constants, attributes)
        target = GPUTarget("cuda", self.target.capability, 32)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        found = triton.compile(source, target=target, options=options)
        self.done.append(
            Compiled(
                self.kernel.__name__,
                named.get("DECODE", False),
                found.metadata.shared,
                self.target.shared_memory,
                len(re.findall(r"cp\.async\.c[ag]\.shared\.global.*, 0x10,", found.asm["ptx"])),
                found.asm["ttgir"].count("ttng.warp_group_dot "),
            )
        )


def type_of(value: Any, parameter: Any) -> str:
    """As Triton's launcher specialises: constants, None and 1 are compiled in."""
    is_fixed = parameter.is_constexpr or value is None
    if is_fixed or (type(value) is int and value == 1 and not parameter.do_not_specialize):
        return "constexpr"
    if isinstance(value, torch.Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    assert isinstance(value, float), (parameter.name, value)
    return "fp32"


def is_divisible(value: Any, parameter: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0
    return isinstance(value, int) and not parameter.do_not_specialize and value % 16 == 0


class Compiling:
    """A context in which every kernel is a Compiler for one architecture. Enter for the list of them."""

    def __init__(self, target: Architecture) -> None:
        self.patches = [mock.patch.object(Device, "of", lambda device: target.device)]
        self.compilers: list[Compiler] = []
        for module_name, names in KERNELS.items():
            module = importlib.import_module(module_name)
            for name in names:
                compiler = Compiler(getattr(module, name), target)
                self.compilers.append(compiler)
                self.patches.append(mock.patch.object(module, name, compiler))

    def __enter__(self) -> list[Compiler]:
        for patch in self.patches:
            patch.start()
        return self.compilers

    def __exit__(self, *exception: object) -> None:
        for patch in self.patches:
            patch.stop()


def launch_all(dtype: torch.dtype, head_dims: list[int]) -> None:
    """Every operation; attention with decode alone and mixed, with a sliding window and without."""
    ops = TritonOps()
    t = Target(ops, torch.device("cpu"), dtype)
    x, three = t.randn(3, 1024), torch.arange(3)
    ops.rms_norm(x, x[0], 1e-5)
    ops.add_rms_norm(x, x.clone(), x[0], 1e-5)
    ops.silu_and_mul(x)
    logits = drawn(5003).to(dtype)
    ops.sample(logits, *columns(*logits.shape))
    for size in head_dims:
        cache, norm = t.randn(4, 2, 2, 16, 2, size), t.randn(size)
        table = torch.ones(9, size)
        ops.rotary_and_store(t.randn(3, 8 * size), table, three, cache, 1, three, norm, norm)
        for lengths, window in ((DECODE, None), (DECODE, 5), (MIXED, None), (MIXED, 5)):
            case = make_attention(t, Spec(lengths, 8, 2, size, 16))
            ops.attention(*case, size**-0.5, window)


def main() -> None:
    architecture, dtype, *head_dims = sys.argv[1:]
    with Compiling(ARCHITECTURES[architecture]) as compilers:
        launch_all(getattr(torch, dtype), [int(size) for size in head_dims or (64, 80, 128, 256)])
    for compiler in compilers:
        for found in compiler.done:
            print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
