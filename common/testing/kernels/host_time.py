"""`python -m common.testing.kernels.host_time`: what a layer's launches cost the host, without a GPU.

Everything between two matrix products of a decode step of Qwen3-0.6B, down to the last line of Python:
Triton's launch function does nothing, so the driver's own time (2 to 3 us a launch) is not in it.
Prints a Markdown table: CPU time by Triton's own way, `kernel[grid](...)`, and by `Launcher`.
"""

import time
from collections.abc import Callable
from unittest import mock

import torch

from common.kernels.triton.launch import Launcher
from common.kernels.triton.ops import TritonOps
from common.testing.kernels.fake_gpu import fake_gpu
from common.testing.kernels.launches import BLOCK_SIZE, MODELS, metadata_of, recorded

MODEL, DTYPE = MODELS[0], torch.bfloat16
BATCHES = ((1, 128), (1, 4096), (64, 1024), (256, 1024))  # sequences, tokens of each
ROUNDS, CALLS = 30, 100


def layer_of(num_seqs: int, num_tokens: int) -> Callable[[], None]:
    """The operations of one layer of one decode step, on inputs that are there."""
    ops, model = TritonOps(), MODEL
    x, residual = torch.zeros(2, num_seqs, model.hidden, dtype=DTYPE)
    weight, norms = (
        torch.ones(model.hidden, dtype=DTYPE),
        torch.ones(2, model.head_dim, dtype=DTYPE),
    )
    width = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim
    qkv = torch.zeros(num_seqs, width, dtype=DTYPE)
    gate_up = torch.zeros(num_seqs, 2 * model.intermediate, dtype=DTYPE)
    cache = torch.zeros(2, 2, 2, BLOCK_SIZE, model.num_kv_heads, model.head_dim, dtype=DTYPE)
    table, positions = torch.zeros(9, model.head_dim), torch.zeros(num_seqs, dtype=torch.int64)
    metadata = metadata_of([(1, num_tokens)] * num_seqs, decode_queries=1)
    slots, scale, (q_norm, k_norm) = metadata.slot_mapping, model.head_dim**-0.5, norms

    def layer() -> None:
        ops.add_rms_norm(x, residual, weight, 1e-6)
        query = ops.rotary_and_store(
            qkv, table, positions, cache, 1, slots, q_norm=q_norm, k_norm=k_norm, eps=1e-6
        )
        ops.attention(query, cache, 1, metadata, scale, None)
        ops.add_rms_norm(x, residual, weight, 1e-6)
        ops.silu_and_mul(gate_up)

    return layer


def microseconds(call: Callable[[], None]) -> float:
    """Of this thread's CPU time, in the best of several rounds: others may be at work."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.thread_time()
        for _ in range(CALLS):
            call()
        best = min(best, time.thread_time() - start)
    return best / CALLS * 1e6


def triton_s_way(self, grid, arguments, constants, num_warps=4, num_stages=3) -> None:
    self.kernel[grid](*arguments, *constants, num_warps=num_warps, num_stages=num_stages)


def main() -> None:
    print("| sequences x tokens | launches | `kernel[grid](...)`, us | `Launcher`, us |")
    print("|---|---:|---:|---:|")
    with fake_gpu() as fake, torch.inference_mode():
        fake.launch = lambda *arguments: None
        for num_seqs, num_tokens in BATCHES:
            layer = layer_of(num_seqs, num_tokens)
            with recorded() as launches:
                layer()
            with mock.patch.object(Launcher, "__call__", triton_s_way):
                before = microseconds(layer)
            after = microseconds(layer)
            batch = f"{num_seqs} x {num_tokens}"
            print(f"| {batch} | {len(launches)} | {before:.0f} | {after:.0f} |", flush=True)


if __name__ == "__main__":
    main()
