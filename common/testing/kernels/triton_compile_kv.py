"""Compile the kernels that read and write a quantised KV cache, for GPUs that are not there.

`python -m common.testing.kernels.triton_compile_kv ARCHITECTURE DTYPE KV_DTYPE [HEAD_DIM ...]` prints a
line of JSON for each kernel, as `triton_compile` does. TRITON_INTERPRET must not be set.
"""

import json
import sys
from dataclasses import asdict

import torch

from common.kernels.quantized_kv import row_size
from common.kernels.triton.ops import TritonOps
from common.testing.kernels.attention_cases import DECODE, LONG, MIXED, Spec, make_attention
from common.testing.kernels.case import Target
from common.testing.kernels.fake_gpu import ARCHITECTURES, fake_gpu
from common.testing.kernels.triton_compile import compiled_kernels


def launch(dtype: torch.dtype, kv_dtype: torch.dtype, head_dim: int) -> None:
    t, three = Target(TritonOps(), torch.device("cpu"), dtype), torch.arange(3)
    row = row_size(head_dim, kv_dtype)
    cache, norm = torch.zeros(4, 2, 2, 16, 2, row).to(kv_dtype), t.randn(head_dim)
    qkv, table = t.randn(3, 8 * head_dim), torch.ones(9, head_dim)
    t.ops.rotary_and_store(qkv, table, three, cache, 1, three, norm, norm)
    for lengths, window in ((DECODE, None), (LONG, 5), (MIXED, None), (MIXED, 5)):
        query, _, layer, metadata = make_attention(t, Spec(lengths, 8, 2, head_dim, 16))
        t.ops.attention(query, cache, layer, metadata, head_dim**-0.5, window)


def main() -> None:
    architecture, dtype, kv_dtype, *head_dims = sys.argv[1:]
    assert architecture in ARCHITECTURES, architecture
    with fake_gpu(architecture) as fake:
        for size in head_dims or (64, 80, 128, 256):
            launch(getattr(torch, dtype), getattr(torch, kv_dtype), int(size))
        for found in compiled_kernels(fake):
            print(json.dumps(asdict(found)))


if __name__ == "__main__":
    main()
