"""Part 12's copies between the device and pinned memory, on a stream of their own: how fast, whether
steps notice them, and whether a block can be read before it is written, or written before it is read.

The peak beside which they stand is one copy of as many bytes from pinned memory, in one piece. Races are
looked for with patterns: a slow kernel writes a block just before it is saved, and other kernels write
over it the moment that its copy is said to be done.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any
from unittest import mock

from common.bench.core.workload import random_prompts
from common.gpu_check.engines import engine_of
from common.gpu_check.items import Check, Once

if TYPE_CHECKING:
    import torch

    from common.kv_store.block_copies import BlockCopies

SHAPE, QUICK_SHAPE = (28, 2, 16, 8, 128), (2, 2, 4, 2, 8)  # of a block, as Qwen3-0.6B has it
NUM_BLOCKS, QUICK_NUM_BLOCKS = 1024, 24
AT_ONCE, QUICK_AT_ONCE = (1, 8, 64, 512), (3,)  # blocks of one order
ROUNDS, QUICK_ROUNDS = 200, 6  # of the hunt for races
WAYS = {"save": "device to host", "load": "host to device"}
SECONDS = 60.0  # for a copy to be done


def checks(job: dict[str, Any]) -> Iterator[Check]:
    """{"name", "part", "model", "device", "dtype", "quick"} -> rates, races, an engine that swaps."""
    sizes = QUICK_AT_ONCE if job["quick"] else AT_ONCE
    yield f"{job['name']}, copies, peak of one piece", lambda: peaks(job)
    for kind, size, scattered in itertools.product(WAYS, sizes, (False, True)):
        place = "scattered" if scattered else "in a row"
        name = f"{job['name']}, copies, {WAYS[kind]}, {size} blocks {place}"
        yield name, lambda k=kind, n=size, s=scattered: rates(job, k, n, s)
    yield f"{job['name']}, copies, races", lambda: races(job)
    yield f"{job['name']}, copies, ordered without waiting", lambda: unwaited(job)
    engine = Once(lambda: swapping_engine(job))
    yield f"{job['name']}, copies, a burst that is swapped", lambda: burst(job, engine())
    yield f"{job['name']}, copies, steps beside them", lambda: beside(job, engine())


def started(job: dict[str, Any]) -> tuple["torch.Tensor", "BlockCopies"]:
    """(a KV cache, copies that know it)."""
    import torch

    from common.kv_store.block_copies import BlockCopies

    count = QUICK_NUM_BLOCKS if job["quick"] else NUM_BLOCKS
    shape = (count, *(QUICK_SHAPE if job["quick"] else SHAPE))
    cache = torch.zeros(shape, device=job["device"], dtype=getattr(torch, job["dtype"]))
    copies = BlockCopies(count)
    copies.register_kv_caches([cache])
    return cache, copies


def done(copies: "BlockCopies") -> list[Any]:
    """The next copies that are done. Raises AssertionError where none is."""
    deadline = time.perf_counter() + SECONDS
    while not (found := copies.get_finished()):
        copies.wait(0.1)
        assert time.perf_counter() < deadline, "a copy is not done"
    return found


def peaks(job: dict[str, Any]) -> dict[str, float]:
    """GB/s of one large copy each way."""
    return {f"{kind} GB/s": peak(job, kind) for kind in WAYS}


def peak(job: dict[str, Any], kind: str) -> float:
    import torch

    on_gpu = job["device"].startswith("cuda")
    size = 1 << (16 if job["quick"] else 28)
    device = torch.empty(size, dtype=torch.uint8, device=job["device"])
    host = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
    to, source = (host, device) if kind == "save" else (device, host)
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    seconds = []
    for _ in range(3 if job["quick"] else 8):
        synchronize()
        begin = time.perf_counter()
        to.copy_(source, non_blocking=True)
        synchronize()
        seconds.append(time.perf_counter() - begin)
    return size / statistics.median(seconds) / 1e9


def rates(job: dict[str, Any], kind: str, count: int, scattered: bool) -> dict[str, float]:
    """GB/s of orders of so many blocks, and the share of the peak (%)."""
    from common.kv_store.block_copies import Copy

    cache, copies = started(job)
    step = 2 if scattered else 1
    blocks = [i * step % len(cache) for i in range(count)]
    found = []
    for number in range(4 if job["quick"] else 12):
        copies.start_load_kv([Copy(number + 1, kind, blocks, blocks)])
        found += done(copies)
    copies.shutdown()
    assert all(one.num_blocks == count for one in found), "a copy has failed"
    best = statistics.median(one.num_bytes / one.seconds / 1e9 for one in found[2:])
    return {"GB/s": best, "% of one piece": 100 * best / peak(job, kind)}


def races(job: dict[str, Any]) -> dict[str, Any]:
    """Blocks go out and come back, each time with other numbers. Raises AssertionError where a block
    has not what was written before its order."""
    import torch

    from common.kv_store.block_copies import Copy

    cache, copies = started(job)
    half = len(cache) // 2
    first, second = list(range(half)), list(range(half, 2 * half))
    heavy = torch.ones(64 if job["quick"] else 4096, device=job["device"]).expand(
        64 if job["quick"] else 4096, -1
    )
    rounds = QUICK_ROUNDS if job["quick"] else ROUNDS
    wrong: list[int] = []
    for number in range(1, rounds + 1):
        waste = heavy @ heavy  # the write comes late
        cache[:half].fill_(number % 100)
        copies.start_load_kv([Copy(2 * number - 1, "save", first, first)])
        done(copies)
        cache[:half].fill_(-1)  # the block has another owner by now
        copies.start_load_kv([Copy(2 * number, "load", second, first)])
        done(copies)
        if not bool((cache[half : 2 * half] == number % 100).all()):
            wrong.append(number)
        del waste
    copies.shutdown()
    assert not wrong, f"rounds with other numbers: {wrong[:10]}"
    return {"num_rounds": rounds, "num_blocks": half}


def unwaited(job: dict[str, Any]) -> dict[str, Any]:
    """Orders are given under PyTorch's guard, which raises where the host would wait."""
    import torch

    from common.kv_store.block_copies import Copy

    cache, copies = started(job)
    on_gpu = job["device"].startswith("cuda")
    blocks = list(range(len(cache) // 2))
    if on_gpu:
        torch.cuda.set_sync_debug_mode("error")
    begin = time.perf_counter()
    try:
        copies.start_load_kv([Copy(1, "save", blocks, blocks)])
    finally:
        if on_gpu:
            torch.cuda.set_sync_debug_mode("default")
    seconds = time.perf_counter() - begin
    [copied] = done(copies)
    copies.shutdown()
    return {"order us": 1e6 * seconds, "copy us": 1e6 * copied.seconds}


def swapping_engine(job: dict[str, Any]) -> tuple[Any, list[list[int]], int]:
    """(an engine with a quarter of the blocks that all prompts need, these, tokens of each)."""
    count, length, most = (6, 24, 60) if job["quick"] else (64, 256, 256)
    blocks = count * -(-(length + most) // 16) // 4 + 2
    engine, _ = engine_of(
        job, max_num_seqs=count, num_blocks=blocks, block_size=16, max_model_len=length + most,
        offload="swap", host_kv_memory=(1 << 24) if job["quick"] else (8 << 30),
    )  # fmt: skip
    return engine, random_prompts([length] * count, engine.vocab_size, "copies"), most


def burst(job: dict[str, Any], swapping: tuple[Any, list[list[int]], int]) -> dict[str, Any]:
    """A burst in which every preempted sequence is swapped, whatever that takes. Raises AssertionError
    where tokens were computed anew, or other tokens came out than of an engine with room for all."""
    from common.bench.core.rates import same_tokens

    engine, prompts, most = swapping
    rates_of = engine.connector.rates
    with mock.patch.object(rates_of, "swap_pays", lambda num_blocks, num_tokens: True):
        seconds, outputs = generate(engine, prompts, most)
    counts = engine.stats()
    engine.check_integrity()
    large, _ = engine_of(
        job, max_num_seqs=len(prompts), block_size=16, num_blocks=5 * engine.kv.num_blocks
    )
    expected_seconds, expected = generate(large, prompts, most)
    large.shutdown()
    same = same_tokens(outputs, expected)
    assert counts["num_recomputed_tokens"] == 0, counts["num_recomputed_tokens"]
    assert counts["num_swapped_tokens"] > 0, "nothing was swapped"
    assert job["dtype"] != "float32" or same == 100, f"{same:.1f}% of the tokens"
    return {
        "seconds": seconds,
        "seconds with room": expected_seconds,
        "same tokens %": same,
        "num_preemptions": counts["num_preemptions"],
        "num_swapped_tokens": counts["num_swapped_tokens"],
        "save GB/s": rate(counts, "save"),
        "load GB/s": rate(counts, "load"),
    }


def generate(engine: Any, prompts: list[list[int]], most: int) -> tuple[float, list[list[int]]]:
    from common.sampling import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
    begin = time.perf_counter()
    completions = engine.generate(prompts, params, progress=False)
    return time.perf_counter() - begin, [list(one.token_ids) for one in completions]


def rate(counts: dict[str, Any], kind: str) -> float | None:
    seconds = counts[f"offload_seconds_{kind}"]
    return counts[f"offload_bytes_{kind}"] / seconds / 1e9 if seconds else None


def beside(job: dict[str, Any], swapping: tuple[Any, list[list[int]], int]) -> dict[str, float]:
    """Microseconds of a decode step, alone and while copies go on without a pause."""
    from common.kv_store.block_copies import Copy

    engine, prompts, _ = swapping
    few = [prompt[:16] for prompt in prompts[:4]]
    _, copies = started(job)
    blocks = list(range(copies.num_host_blocks // 2))
    numbers = itertools.count(1)

    def timed(before_step: Callable[[], None]) -> float:
        step, seconds = engine.step, []

        def watched() -> Any:
            before_step()
            begin = time.perf_counter()
            outputs = step()
            seconds.append(time.perf_counter() - begin)
            return outputs

        engine.step = watched
        try:
            generate(engine, few, 12 if job["quick"] else 96)
        finally:
            del engine.step
        return 1e6 * statistics.median(seconds[2:])

    def copy() -> None:
        copies.get_finished()
        if copies.orders.qsize() < 2:
            copies.start_load_kv([Copy(next(numbers), "save", blocks, blocks)])

    timed(lambda: None)
    alone, busy = timed(lambda: None), timed(copy)
    copies.shutdown()
    return {"step us": alone, "step us, beside copies": busy, "times": busy / alone}
