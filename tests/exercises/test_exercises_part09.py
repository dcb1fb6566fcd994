"""Part 09's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from common.bench.parallel.watched import Watch
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, greedy_gaps
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"  # 3 layers, 64 features, 512 tokens; the head is not the embedding
VOCAB, HIDDEN, LAYERS = 512, 64, 3
PROMPTS = [[(7 * i + j) % 500 + 2 for i in range(10)] for j in range(4)]
NUM_TOKENS = 12
NUM_COMPUTED = len(PROMPTS) * (10 + NUM_TOKENS - 1)
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@contextmanager
def engine_with(**flags: Any) -> Iterator[Any]:
    """Two ranks."""
    flags = {
        "num_blocks": 64,
        "block_size": 4,
        "max_num_seqs": 8,
        "tensor_parallel_size": 2,
    } | flags
    engine = module_of(9, "engine").LLMEngine(
        module_of(9, "config").EngineConfig(model=MODEL, threads=1, **flags)
    )
    try:
        yield engine
    finally:
        engine.shutdown()


def answers(engine: Any, params: SamplingParams = GREEDY) -> tuple[list[list[int]], Watch]:
    """Tokens of all prompts, and what rank 0's group did meanwhile."""
    watch = Watch(engine.runner.ranks.group)
    completions = engine.generate(PROMPTS, params, progress=False)
    watch.stop()
    return [list(done.token_ids) for done in completions], watch


# 1. Candidates instead of logits.


def test_candidates_are_gathered() -> None:
    """Rank 0 gets 8 logits and 8 token ids of 4 or 8 bytes for each sampled token, and no more."""
    gathered = []

    def watched(gather: Any) -> Any:
        def run(x: Any, shapes: Any) -> Any:
            parts = gather(x, shapes)
            gathered.append(sum(part.nbytes for part in parts[1:]))
            return parts

        return run

    with engine_with(gather_candidates=8) as engine:
        group = engine.runner.ranks.group
        group.gather = watched(group.gather)
        outputs = engine.generate(PROMPTS, GREEDY, progress=False)
        num_sampled = len(PROMPTS) * NUM_TOKENS
        assert sum(gathered) <= num_sampled * 8 * (4 + 8)
        tokens = [list(done.token_ids) for done in outputs]
        assert check_greedy(MODEL, list(zip(PROMPTS, tokens, strict=True))).is_right


def test_what_needs_all_logits_gets_them() -> None:
    """Sampled requests, and greedy ones that want log probabilities, as without the setting."""
    seeded = SamplingParams(temperature=1.0, seed=3, max_tokens=NUM_TOKENS, ignore_eos=True)
    scored = SamplingParams(temperature=0.0, logprobs=2, max_tokens=4, ignore_eos=True)
    results = []
    for flags in ({}, {"gather_candidates": 8}):
        with engine_with(**flags) as engine:
            [scores] = engine.generate(PROMPTS[:1], scored, progress=False)
            results.append((answers(engine, seeded)[0], repr(scores.logprobs)))
    assert results[0] == results[1]


# 2. Smaller sums.


def test_sums_in_bfloat16_send_half() -> None:
    with engine_with(sum_dtype="bfloat16") as engine:
        tokens, watch = answers(engine)
    total = watch.totals()["all_reduce"]
    whole = NUM_COMPUTED * (2 * LAYERS + 1) * HIDDEN * 4
    assert total.num_bytes <= 0.6 * whole  # the embedding's sum may stay as it is
    gaps = [
        gap
        for prompt, output in zip(PROMPTS, tokens, strict=True)
        for gap in greedy_gaps(MODEL, prompt, output, None)
    ]
    assert max(gaps) < 1.0  # the model's logits spread over some tens


# 3. A whole embedding.


def test_a_whole_embedding_spares_a_sum() -> None:
    with engine_with() as engine:
        expected, before = answers(engine)
        divided = engine.stats()["rank_bytes"]
    with engine_with(split_embedding=False) as engine:
        tokens, after = answers(engine)
        whole = engine.stats()["rank_bytes"]
    assert tokens == expected
    steps = before.totals()["broadcast"].count
    assert before.totals()["all_reduce"].count == steps * (2 * LAYERS + 1)
    assert after.totals()["all_reduce"].count == steps * 2 * LAYERS
    for (small, _), (large, _) in zip(divided, whole, strict=True):
        assert large - small == VOCAB // 2 * HIDDEN * 4
