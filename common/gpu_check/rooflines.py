"""Single operations at the shapes of Qwen3-0.6B and Qwen3-8B, against the machine's limits.

Attention at batches and contexts that engines see, also one long sequence among short ones; with
other tiles than the table's, which only a measurement can choose; everything else; and PyTorch's own
attention on whole prompts.

Two times for each: `us` is the GPU's alone, between two events, with the second-level cache
overwritten before; `call_us` is what a call costs when many follow each other, Python and launch
included, inputs cached. Where the second is larger, the CPU is what an engine waits for. On a CPU
there is one clock, and the two are the same but for the cache.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

from common.bench.offline import matmul_rate
from common.gpu_check.cases import Case, Maker, Shape
from common.gpu_check.correctness import KERNELS
from common.gpu_check.engines import threads_of
from common.gpu_check.items import Check

if TYPE_CHECKING:
    import torch

    from common.kernels import Ops

FLUSH_BYTES, QUICK_FLUSH_BYTES = 1 << 30, 1 << 16  # more than any second-level cache
SHAPES = [
    Shape("qwen3-0.6b", 1024, 3072, 16, 8, 128, 151936),
    Shape("qwen3-8b", 4096, 12288, 32, 8, 128, 151936),
]
MOE_SHAPES = [(Shape("qwen3-30b-a3b", 2048, 768, 32, 4, 128, 151936), 128, 8)]  # experts, a token's
QUICK_MOE_SHAPES = [(Shape("tiny", 64, 32, 4, 2, 16, 512), 8, 3)]
QUICK_SHAPES = [Shape("tiny", 64, 160, 4, 2, 16, 512)]
GROUPS = {2: (16, 8), 4: (32, 8), 7: (28, 4)}  # query heads of a KV head: heads, KV heads
BATCHES, CONTEXTS, PROMPTS = (1, 16, 64, 256), (1024, 4096, 8192), ((1, 2048), (1, 8192), (8, 1024))
QUICK_BATCHES, QUICK_CONTEXTS, QUICK_PROMPTS = (4,), (64,), ((2, 32),)
LONG, SHORT = 32768, 512  # one sequence among 63
TOKENS, QUICK_TOKENS = (1, 16, 256, 2048), (1, 4)  # of linear products
SMALL_TOKENS, QUICK_SMALL_TOKENS = (1, 64, 2048), (4,)  # of what lies between them
ROWS, QUICK_ROWS = (4, 64, 256), (4,)  # of logits to sample from
# (rows, tokens, warps, stages)
PREFILL_TILES = [
    (128, 64, 8, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 128, 4, 2), (128, 128, 8, 3),
    (64, 64, 4, 3), (64, 128, 4, 2), (128, 32, 4, 4),
]  # fmt: skip
DECODE_TILES = [
    (16, 64, 4, 3), (16, 64, 4, 4), (16, 128, 4, 2), (16, 128, 4, 3), (16, 128, 8, 3),
    (16, 32, 4, 4), (16, 32, 2, 4),
]  # fmt: skip
SPLITS = (128, 512)  # tokens, beside the table's own


Pair = tuple[str, Case]  # what is measured, under which name


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"device", "quick", "limits", "groups"} -> one check a case, for the device's kernels."""
    own = target(job)
    for group in job["groups"]:
        for name, case in GROUPS_OF_CASES[group](*own, job["quick"]):
            yield name, lambda case=case: measure(case, job)


def compile_ahead(job: dict[str, Any]) -> Iterator[Check]:
    """{"device", "quick", "share": (i, n)} -> one check: every n-th case is called once."""
    first, every = job["share"]
    yield f"compile ahead, {first + 1} of {every}", lambda: call_each(job, first, every)


def call_each(job: dict[str, Any], first: int, every: int) -> dict[str, Any]:
    import torch

    pairs = [
        pair
        for group in GROUPS_OF_CASES.values()
        for pair in group(*target(job), job["quick"], is_small=True)
    ]
    failures = {}
    with torch.inference_mode():
        for name, case in pairs[first::every]:
            try:
                with case.under():
                    case.make()()
            except Exception as error:  # where it is measured, it is told
                failures[name] = f"{type(error).__name__}: {error}"[:200]
    return {"num_cases": len(pairs[first::every]), "failures": failures}


def target(job: dict[str, Any]) -> tuple["torch.device", "torch.dtype", "Ops"]:
    import torch

    from common.kernels import select_ops

    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    torch.set_num_threads(threads_of(job) or torch.get_num_threads())
    return device, dtype, select_ops(KERNELS[device.type], device, threads_of(job))


def attention_cases(
    device: "torch.device", dtype: "torch.dtype", ops: "Ops", quick: bool, is_small: bool = False
) -> Iterator[Pair]:
    """Decode and prefill. is_small: one batch is enough, since others run the same kernels."""
    batches = QUICK_BATCHES if quick else BATCHES[:1] if is_small else BATCHES
    contexts = QUICK_CONTEXTS if quick else CONTEXTS[:1] if is_small else CONTEXTS
    prompts = QUICK_PROMPTS if quick else PROMPTS[:1] if is_small else PROMPTS
    for group, (num_heads, num_kv_heads) in GROUPS.items():
        maker = Maker(Shape("", 0, 0, num_heads, num_kv_heads, 128, 0), device, dtype)
        cases = [maker.attention(ops, size, 1, length) for size in batches for length in contexts]
        cases += [maker.attention(ops, size, length, length) for size, length in prompts]
        if not quick:
            lengths = [SHORT] * 63 + [LONG]
            cases.append(maker.attention_of(ops, f"attention, 63 of {SHORT}, 1 of {LONG}", lengths))
            cases.append(maker.attention_of(ops, f"attention, 64 of {SHORT}", [SHORT] * 64))
        if group == 2 and not is_small:
            cases += [maker.sdpa(size, length) for size, length in prompts]
        yield from ((f"group {group}, {case.name}", case) for case in cases)


def tile_cases(
    device: "torch.device", dtype: "torch.dtype", ops: "Ops", quick: bool, is_small: bool = False
) -> Iterator[Pair]:
    """Attention of group 2 with other tiles, and with more or fewer tokens to a program."""
    if device.type != "cuda":
        return
    from common.kernels.triton import attention

    maker = Maker(Shape("", 0, 0, *GROUPS[2], 128, 0), device, dtype)
    most = 32 if quick else 1024 if is_small else 8192
    prompt = maker.attention(ops, 1, most, most)
    most = 600 if quick else 1024 if is_small else 4096
    decode = maker.attention(ops, 1 if is_small or quick else 64, 1, most)
    tables = {  # of tiles; one for two-byte formats, and one for float32
        2: ("PREFILL", "DECODE"),
        4: ("PREFILL_FLOAT32", "DECODE_FLOAT32"),
    }
    swept = zip(
        tables[dtype.itemsize], (PREFILL_TILES, DECODE_TILES), (prompt, decode), strict=True
    )
    for table, tiles, case in swept:
        for numbers in tiles[: 1 if quick else None]:
            patch = mock.patch.dict(getattr(attention, table), {128: attention.Tile(*numbers)})
            yield f"tile {numbers}, {case.name}", patched(case, patch)
    for tokens in SPLITS[: 1 if quick else None]:
        patch = mock.patch.object(attention, "MIN_SPLIT", tokens)
        yield f"{tokens} tokens a program, {decode.name}", patched(decode, patch)


def patched(case: Case, patch: Any) -> Case:
    """The same case under another table of tiles."""
    from common.kernels.triton import attention

    @contextlib.contextmanager
    def under() -> Iterator[None]:
        with patch:
            attention.tile_for.cache_clear()
            try:
                yield
            finally:
                attention.tile_for.cache_clear()

    return replace(case, under=under)


def other_cases(
    device: "torch.device", dtype: "torch.dtype", ops: "Ops", quick: bool, is_small: bool = False
) -> Iterator[Pair]:
    """Products, what lies between them, sampling."""
    for shape in QUICK_SHAPES if quick else SHAPES:
        maker = Maker(shape, device, dtype)
        cases = [
            case
            for count in (QUICK_SMALL_TOKENS if quick else SMALL_TOKENS)
            for case in maker.small(ops, count)
        ]
        for rows in QUICK_ROWS if quick else ROWS:
            cases += maker.samplers(ops, rows)
        cases += [] if is_small else maker.linears(ops, QUICK_TOKENS if quick else TOKENS)
        yield from ((f"{shape.name}, {case.name}", case) for case in cases)
    # All kernels are compiled when the experts are prepared.
    counts = QUICK_TOKENS if quick else TOKENS[:1] if is_small else TOKENS
    for shape, num_experts, k in QUICK_MOE_SHAPES if quick else MOE_SHAPES:
        maker = Maker(shape, device, dtype)
        for count in counts:
            case = maker.experts(ops, count, num_experts, k)
            yield f"{shape.name}, {case.name}", case


GROUPS_OF_CASES = {"attention": attention_cases, "tiles": tile_cases, "others": other_cases}


def measure(case: Case, job: dict[str, Any]) -> dict[str, Any]:
    """Medians in microseconds, and shares of the limits in percent."""
    import torch

    device, dtype, _ = target(job)
    with torch.inference_mode(), case.under():
        return timed(case.make(), case, dtype, device, job)


def timed(
    call: Callable[[], object],
    case: Case,
    dtype: "torch.dtype",
    device: "torch.device",
    job: dict[str, Any],
) -> dict[str, Any]:
    count = 3 if job["quick"] else 20
    for _ in range(3):
        call()
    cuda = device.type == "cuda"
    flush = QUICK_FLUSH_BYTES if job["quick"] else FLUSH_BYTES
    alone = statistics.median(gpu_seconds(call, count, flush) if cuda else cpu_seconds(call, count))
    gbps, flops = case.num_bytes / alone / 1e9, case.num_flops / alone
    peak = matmul_rate(str(dtype).removeprefix("torch."), job["limits"])
    return {
        "us": alone * 1e6,
        "call_us": call_seconds(call, count, cuda) * 1e6,
        "gbps": gbps,
        "tflops": flops / 1e12,
        "mbu": 100 * gbps / job["limits"]["read_gbps"],
        "mfu": 100 * flops / peak if peak else None,
    }


def gpu_seconds(call: Callable[[], object], count: int, flush_bytes: int) -> list[float]:
    """Seconds of the GPU for each call, between events; the host runs ahead while the cache is
    overwritten, so a slow launch does not count."""
    import torch

    waste = torch.empty(flush_bytes, dtype=torch.int8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, end in pairs:
        waste.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairs]


def cpu_seconds(call: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def call_seconds(call: Callable[[], object], count: int, cuda: bool) -> float:
    """Seconds a call, when calls follow each other at once."""
    import torch

    synchronize = torch.cuda.synchronize if cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    for _ in range(count):
        call()
    synchronize()
    return (time.perf_counter() - start) / count
