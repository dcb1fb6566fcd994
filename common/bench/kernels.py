"""`kernels`: each operation of `common.kernels`, implementations side by side, against the limits.

Shapes are SmolLM2-135M's. Implementations take turns within every round, so that a slow moment of
the machine hits all of them; times are medians over the rounds. Weights and KV are drawn from many
copies in turn, as a model's layers are, so they come from memory and not from the cache.

GB/s counts what must be read and written once, GFLOP/s multiplications and additions; of the two
shares of the measured limits the larger one says what the operation is bound by.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.bench.arguments import add_output_arguments, finish, positive, progress
from common.bench.limits import measure_limits
from common.bench.noise import OtherWork, disturbance
from common.bench.results import column, make_result

if TYPE_CHECKING:
    from common.kernels import Ops

HIDDEN, INTERMEDIATE, VOCAB = 576, 1536, 49152
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 9, 3, 64, 16
LINEARS = [(960, 576), (576, 576), (3072, 576), (576, 1536), (VOCAB, 576)]
ATTENTIONS = [(1, 1, 128), (1, 1, 1024), (16, 1, 128), (16, 1, 512), (1, 128, 128), (1, 512, 512)]
COPIES_BYTES = 256 << 20  # of weights or KV, taken in turn
ROUND_SECONDS = 0.02  # of one implementation in one round

COLUMNS = [
    column("op", "operation"),
    column("shape", "shape"),
    column("kernels", "kernels"),
    column("us", "median", "µs", 1),
    column("gbps", "memory", "GB/s", 1),
    column("gflops", "arithmetic", "GFLOP/s", 1),
    column("mbu", "of read limit", "%", 0),
    column("mfu", "of matmul limit", "%", 0),
]


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make` builds inputs for an implementation and returns the call,
    which takes the number of the run."""

    op: str
    shape: str
    num_bytes: float
    num_flops: float
    make: Callable[["Ops"], Callable[[int], object]]


def linear_case(num_tokens: int, out_features: int, in_features: int, device: str) -> Case:
    size = 4 * out_features * in_features

    def make(ops: "Ops") -> Callable[[int], object]:
        import torch

        x = torch.randn(num_tokens, in_features, device=device)
        weights = [
            ops.prepare_weight(torch.randn(out_features, in_features, device=device))
            for _ in range(max(1, min(40, COPIES_BYTES // size)))
        ]
        return lambda i: ops.linear(x, weights[i % len(weights)])

    num_bytes = size + 4 * num_tokens * (in_features + out_features)
    num_flops = 2 * num_tokens * out_features * in_features
    return Case(
        "linear", f"{num_tokens} x {out_features} x {in_features}", num_bytes, num_flops, make
    )


def attention_case(num_seqs: int, num_queries: int, num_tokens: int, device: str) -> Case:
    token_bytes = 2 * NUM_KV_HEADS * HEAD_DIM * 4

    def make(ops: "Ops") -> Callable[[int], object]:
        import torch

        from common.kernels import AttentionMetadata

        num_layers = max(1, min(30, COPIES_BYTES // (num_seqs * num_tokens * token_bytes)))
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        blocks = torch.randperm(num_seqs * num_blocks, device=device)
        shape = (len(blocks), num_layers, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        kv_cache = torch.randn(shape, device=device)
        query = torch.randn(num_seqs * num_queries, NUM_HEADS, HEAD_DIM, device=device)
        starts = torch.arange(num_seqs + 1, device=device, dtype=torch.int32) * num_queries
        metadata = AttentionMetadata(
            cu_seqlens_q=starts,
            seq_lens=torch.full_like(starts[1:], num_tokens),
            block_tables=blocks.view(num_seqs, num_blocks).int(),
            slot_mapping=starts.long(),
            max_query_len=num_queries,
            max_seq_len=num_tokens,
        )
        return lambda i: ops.attention(query, kv_cache, i % num_layers, metadata, HEAD_DIM**-0.5)

    # The queries are the last tokens; each sees those up to itself.
    num_pairs = num_seqs * sum(num_tokens - i for i in range(num_queries))
    num_bytes = num_seqs * (num_tokens * token_bytes + 2 * num_queries * NUM_HEADS * HEAD_DIM * 4)
    name = f"{num_seqs} x {num_queries} of {num_tokens}"
    return Case("attention", name, num_bytes, 4 * num_pairs * NUM_HEADS * HEAD_DIM, make)


def small_cases(num_tokens: int, device: str) -> list[Case]:
    num_columns = (NUM_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM

    def norm(ops: "Ops") -> Callable[[int], object]:
        import torch

        x, residual = torch.randn(2, num_tokens, HIDDEN, device=device)
        weight = torch.ones(HIDDEN, device=device)
        return lambda i: ops.add_rms_norm(x, residual, weight, 1e-5)

    def silu(ops: "Ops") -> Callable[[int], object]:
        import torch

        gate_up = torch.randn(num_tokens, 2 * INTERMEDIATE, device=device)
        return lambda i: ops.silu_and_mul(gate_up)

    def rotary(ops: "Ops") -> Callable[[int], object]:
        import torch

        num_blocks = -(-num_tokens // BLOCK_SIZE)
        shape = (num_blocks, 30, 2, BLOCK_SIZE, NUM_KV_HEADS, HEAD_DIM)
        kv_cache = torch.zeros(shape, device=device)
        cos_sin = torch.rand(num_tokens, HEAD_DIM, device=device)
        slots = torch.arange(num_tokens, device=device)
        qkv = torch.randn(num_tokens, num_columns, device=device)
        return lambda i: ops.rotary_and_store(qkv, cos_sin, slots, kv_cache, i % 30, slots)

    shape = f"{num_tokens} tokens"
    return [
        Case("add_rms_norm", shape, 16 * num_tokens * HIDDEN, 0, norm),
        Case("rotary_and_store", shape, 8 * num_tokens * num_columns, 0, rotary),
        Case("silu_and_mul", shape, 12 * num_tokens * INTERMEDIATE, 0, silu),
    ]


def sample_case(name: str, num_rows: int, params: dict[str, float], device: str) -> Case:
    def make(ops: "Ops") -> Callable[[int], object]:
        import torch

        logits = torch.randn(num_rows, VOCAB, device=device) * 3
        ones = torch.ones(num_rows, device=device)
        numbers = torch.arange(num_rows, device=device)
        top_k = torch.full_like(numbers, int(params.get("top_k", 0)))
        columns = (
            ones * params.get("temperature", 1.0),
            top_k,
            ones * params.get("top_p", 1.0),
            ones * params.get("min_p", 0.0),
            numbers,
        )
        return lambda i: ops.sample(logits, *columns, numbers + i)

    return Case("sample", f"{num_rows} x {VOCAB}, {name}", 4 * num_rows * VOCAB, 0, make)


def all_cases(device: str) -> list[Case]:
    cases = [
        linear_case(num_tokens, *shape, device)
        for shape in LINEARS
        for num_tokens in (1, 4, 16, 32, 128, 512)
        if shape[0] < VOCAB or num_tokens <= 32
    ]
    cases += [attention_case(*sizes, device) for sizes in ATTENTIONS]
    cases += [case for num_tokens in (1, 16, 512) for case in small_cases(num_tokens, device)]
    kinds = {
        "greedy": {"temperature": 0.0},
        "plain": {},
        "top_k 50": {"top_k": 50},
        "top_p 0.9": {"top_p": 0.9},
    }
    for num_rows in (1, 16):
        cases += [sample_case(name, num_rows, params, device) for name, params in kinds.items()]
    return cases


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="auto (default), cpu or cuda")
    parser.add_argument("--kernels", nargs="+", help="default: the reference and the device's own")
    parser.add_argument("--ops", nargs="+", help="only these operations, such as linear")
    parser.add_argument("--threads", type=positive, help="CPU threads (all usable cores)")
    parser.add_argument("--rounds", type=positive, default=7, help="default: 7")
    parser.add_argument("--quick-limits", action="store_true", help="measure limits in a second")
    add_output_arguments(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from common.device import resolve_device, usable_cores
    from common.kernels import select_ops

    device = resolve_device(args.device)[0].type
    torch.set_num_threads(args.threads or usable_cores())
    names = args.kernels or ["reference", "cpu" if device == "cpu" else "triton"]
    implementations = [select_ops(name, device, args.threads) for name in names]
    cases = all_cases(device)
    if args.ops:
        unknown = set(args.ops) - {case.op for case in cases}
        if unknown:
            raise ValueError(f"no operation is called {sorted(unknown)[0]!r}")
        cases = [case for case in cases if case.op in args.ops]
    others = OtherWork()
    with torch.inference_mode():
        measured = [measure(case, implementations, args.rounds) for case in progress(cases, "ops")]
    remark = disturbance(others.cores())
    limits = measure_limits(device, args.quick_limits)
    rows = [
        row
        for case, seconds in zip(cases, measured, strict=True)
        for row in case_rows(case, implementations, seconds, limits)
    ]
    notes = [
        f"float32, {device}; medians of {args.rounds} rounds in which the implementations take"
        " turns. Attention: sequences x queries of tokens."
    ]
    if remark:
        notes.append(f"Disturbed: {remark}.")
    title = f"Kernels, {device}"
    finish(args, make_result(title, COLUMNS, rows, limits=limits, notes=notes))
    return 0


def measure(case: Case, implementations: list["Ops"], rounds: int) -> list[float]:
    """Median seconds of one call, for each implementation."""
    calls = [case.make(ops) for ops in implementations]
    counts = []
    for call in calls:
        timed(call, 2)  # warm
        counts.append(max(3, min(2000, int(ROUND_SECONDS / max(timed(call, 3), 1e-7)))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, count, own in zip(calls, counts, samples, strict=True):
            own.append(timed(call, count))
    return [statistics.median(own) for own in samples]


def timed(call: Callable[[int], object], count: int) -> float:
    """Seconds a call, waiting for the GPU where there is one."""
    import torch

    synchronize = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    synchronize()
    start = time.perf_counter()
    for i in range(count):
        call(i)
    synchronize()
    return (time.perf_counter() - start) / count


def case_rows(
    case: Case, implementations: list["Ops"], seconds: list[float], limits: dict[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for ops, duration in zip(implementations, seconds, strict=True):
        gbps, gflops = case.num_bytes / duration / 1e9, case.num_flops / duration / 1e9
        rows.append(
            {
                "op": case.op,
                "shape": case.shape,
                "kernels": ops.name,
                "us": duration * 1e6,
                "gbps": gbps,
                "gflops": gflops if gflops else None,
                "mbu": 100 * gbps / limits["read_gbps"],
                "mfu": 100 * gflops / limits["fp32_gflops"] if gflops else None,
            }
        )
    return rows
