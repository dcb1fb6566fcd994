"""`python -m common.testing.kernels.triton_variants [MODEL FORMAT [KERNEL]]`: what is compiled for a model.

Prints a Markdown table: each variant that a server of that model launches on an H200, with the
registers, the shared memory and the stack that the compiled kernel takes; KERNEL: of kernels with
this in their names. Compiled for the GPU and never run on it. Without arguments: tables of several
models, and of the tiles that `gpu_check` sweeps.
"""

import subprocess
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch

from common.kernels.triton import attention
from common.kernels.triton.ops import TritonOps
from common.testing.kernels.fake_gpu import FakeDriver, fake_gpu
from common.testing.kernels.launches import MODELS, MOE_MODELS, Model, metadata_of, run_layer
from common.testing.kernels.triton_compile import Compiled, compiled_kernels

DECODE_QUERIES = 5  # one token and four drafts
MAX_LEN = 8192
FORMATS = {"bf16": torch.bfloat16, "fp32": torch.float32}
DEFAULT = [
    ("Qwen3-0.6B", "bf16", ""),
    ("Qwen3-0.6B", "fp32", ""),
    ("SmolLM2-135M", "bf16", ""),
    ("Qwen2.5-0.5B", "bf16", "attention"),
    ("Qwen2.5-7B", "bf16", "attention"),
    ("Mistral-7B-v0.1", "bf16", "attention"),
    ("Qwen3-30B-A3B", "bf16", "expert"),
    ("Qwen3-30B-A3B", "fp32", "expert"),
    ("Mixtral-8x7B-v0.1", "bf16", "expert"),
    ("tiles", "bf16", "attention"),
]
HEAD = ("kernel", "variant", "warps x stages", "registers", "shared bytes", "stack bytes")


def run_layers(model: Model, dtype: torch.dtype) -> None:
    """The batches of the warm-up."""
    ops = TritonOps()
    for batch in ops.warm_up_lengths(model.group, MAX_LEN, MAX_LEN, DECODE_QUERIES):
        run_layer(ops, model, dtype, metadata_of(batch, decode_queries=DECODE_QUERIES))


def run_sampler(model: Model, dtype: torch.dtype) -> None:
    logits, floats = torch.zeros(2, model.vocab, dtype=dtype), torch.ones(2)
    integers = torch.ones(2, dtype=torch.int64)
    columns = (floats, integers, floats, floats, integers, integers, integers)
    TritonOps().sample(logits, *columns)


def described(kernel: str, constants: dict[str, Any]) -> str:
    """A variant in words, as far as variants of one model differ."""
    if kernel == "attention_kernel":
        kind = "decode" if constants["DECODE"] else "prefill"
        tile = f"{constants['ROWS']} rows x {constants['TILE']} tokens"
        return f"{kind}{', split' if constants['SPLIT'] else ''}, {tile}"
    if kernel == "norm_kernel":
        return "alone" if "residual" in constants else "after a sum"
    if kernel == "experts_kernel":
        kind = "gate and up" if constants["IS_FIRST"] else "down"
        return f"{kind}, {constants['ROWS']} tokens x {constants['COLUMNS']} columns"
    return ""


def rows(model: Model, format_name: str, only: str) -> Iterator[tuple[str, ...]]:
    """Once a process: Triton keeps what it has compiled, and does not compile it again."""
    with fake_gpu() as fake:
        run_layers(model, FORMATS[format_name])
        run_sampler(model, FORMATS[format_name])
        yield from described_rows(fake, only)


def described_rows(fake: FakeDriver, only: str) -> Iterator[tuple[str, ...]]:
    for found in sorted(compiled_kernels(fake), key=order):
        if only in found.kernel:
            name = found.kernel.removesuffix("_kernel")
            tile = f"{found.num_warps} x {found.num_stages}"
            numbers = (f"{found.registers}", f"{found.shared:,}", f"{found.stack}")
            yield name, described(found.kernel, found.constants), tile, *numbers


def tile_rows(format_name: str) -> Iterator[tuple[str, ...]]:
    """Attention of the first model with the tiles that `gpu_check` measures."""
    from common.gpu_check.rooflines import DECODE_TILES, PREFILL_TILES

    model, ops = MODELS[0], TritonOps()
    with fake_gpu() as fake:
        for table, tiles, lengths in (
            (attention.PREFILL, PREFILL_TILES, (300, 300)),
            (attention.DECODE, DECODE_TILES, (1, 300)),
        ):
            for numbers in tiles:
                with mock.patch.dict(table, {model.head_dim: attention.Tile(*numbers)}):
                    attention.tile_for.cache_clear()
                    metadata = metadata_of([lengths], decode_queries=1)
                    run_layer(ops, model, FORMATS[format_name], metadata)
        yield from described_rows(fake, "attention_kernel")


def order(found: Compiled) -> tuple[Any, ...]:
    return found.kernel, described(found.kernel, found.constants)


def main() -> None:
    if len(sys.argv) == 1:
        for arguments in DEFAULT:
            command = [sys.executable, "-m", "common.testing.kernels.triton_variants"]
            subprocess.run([*command, *arguments], check=True)
        return
    name, format_name, only = (*sys.argv[1:], "")[:3]
    if name == "tiles":
        found = list(tile_rows(format_name))
    else:
        [model] = [model for model in (*MODELS, *MOE_MODELS) if model.name == name]
        found = list(rows(model, format_name, only))
    print(f"\n**{name}, {format_name}**\n")
    print(f"| {' | '.join(HEAD)} |")
    print(f"|{'---|' * 3}{'---:|' * 3}")
    for row in found:
        print(f"| {' | '.join(row)} |")


if __name__ == "__main__":
    main()
