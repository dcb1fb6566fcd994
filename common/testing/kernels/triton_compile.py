"""Compile the GPU's kernels for GPUs that are not there, with the arguments that launches give them.

Triton's interpreter runs kernels as Python and so passes much that its compiler refuses: values whose
type changes in a loop, tiles that do not fit into shared memory. Here the operations run on small CPU
tensors and a fake GPU: each launch is compiled down to machine code, and nothing is executed.

`python -m common.testing.kernels.triton_compile ARCHITECTURE DTYPE [HEAD_DIM ...]` prints a line of JSON for
each kernel. TRITON_INTERPRET must not be set.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton

from common.kernels.triton.ops import TritonOps
from common.testing.kernels.attention_cases import DECODE, LONG, MIXED, Spec, make_attention
from common.testing.kernels.case import Target
from common.testing.kernels.fake_gpu import ARCHITECTURES, FakeDriver, fake_gpu
from common.testing.kernels.sampler_cases import columns, drawn

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True)
class Compiled:
    kernel: str
    constants: dict[str, Any]  # and None for each tensor that is not there
    num_warps: int
    num_stages: int
    shared: int  # bytes
    allowed: int
    num_async_copies: int  # of 16 bytes each
    num_warpgroup_products: int  # Hopper's matrix products
    registers: int  # of a thread
    stack: int  # bytes of a thread: registers that are spilled lie there


def compiled_kernels(fake: FakeDriver) -> Iterator[Compiled]:
    """Everything that was launched on this GPU."""
    for kernel in dict.fromkeys(source.fn for source, _ in fake.compiled):
        for found in kernel.device_caches[fake.get_current_device()][0].values():
            metadata, names = found.metadata, kernel.arg_names
            registers, stack = resources(found.asm["cubin"])
            yield Compiled(
                kernel.__name__,
                {names[place]: value for (place,), value in found.src.constants.items()},
                metadata.num_warps,
                metadata.num_stages,
                metadata.shared,
                fake.architecture.shared_memory,
                len(re.findall(r"cp\.async\.c[ag]\.shared\.global.*, 0x10,", found.asm["ptx"])),
                found.asm["ttgir"].count("ttng.warp_group_dot "),
                registers,
                stack,
            )


def resources(binary: bytes) -> tuple[int, int]:
    """(registers, bytes of stack) of a thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [(registers, stack)] = re.findall(r"REG:(\d+) STACK:(\d+)", text)
    return int(registers), int(stack)


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
    # All tiles, of sizes that are none of their multiples and of sizes that are.
    for hidden, size in ((1024, 512), (72, 40)):
        ops.prepare_experts([t.randn(2 * size, hidden)] * 3, [t.randn(hidden, size)] * 3)
    for size in head_dims:
        cache, norm = t.randn(4, 2, 2, 16, 2, size), t.randn(size)
        table = torch.ones(9, size)
        ops.rotary_and_store(t.randn(3, 8 * size), table, three, cache, 1, three, norm, norm)
        for lengths, window in ((DECODE, None), (LONG, 5), (MIXED, None), (MIXED, 5)):
            case = make_attention(t, Spec(lengths, 8, 2, size, 16))
            ops.attention(*case, size**-0.5, window)


def main() -> None:
    architecture, dtype, *head_dims = sys.argv[1:]
    assert architecture in ARCHITECTURES, architecture
    with fake_gpu(architecture) as fake:
        launch_all(getattr(torch, dtype), [int(size) for size in head_dims or (64, 80, 128, 256)])
        for found in compiled_kernels(fake):
            print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
