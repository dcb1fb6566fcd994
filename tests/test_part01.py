"""Part 01's own promises: it fits on a screen, and its KV cache changes cost, not results."""

from dataclasses import replace

import torch

from common.chapters.chain import count_code_lines
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy
from common.testing.parts import engine_of, folder_of

MODEL = "random:tiny-qwen3"
GREEDY = SamplingParams(temperature=0.0, max_tokens=25, ignore_eos=True)


def test_fits_in_160_lines() -> None:
    """All of its Python, without blanks, comments and docstrings."""
    lines = {path.name: count_code_lines(path) for path in folder_of(1).glob("*.py")}
    assert sum(lines.values()) <= 160, lines


def test_no_kv_cache_gives_the_same_tokens() -> None:
    """Greedy by the oracle (recomputed logits may break a tie otherwise), seeded exactly."""
    prompts = [[2], [3, 4, 5], list(range(2, 60))]
    without = engine_of(1, MODEL, kv_cache=False)
    outputs = [c.token_ids for c in without.generate(prompts, GREEDY, progress=False)]
    verdict = check_greedy(MODEL, list(zip(prompts, outputs, strict=True)))
    assert verdict.is_right, verdict
    params = replace(GREEDY, temperature=1.0, seed=3)
    seeded = [
        [c.token_ids for c in engine.generate(prompts, params, progress=False)]
        for engine in (without, engine_of(1, MODEL))
    ]
    assert seeded[0] == seeded[1]


@torch.inference_mode()
def test_prefill_then_decode_is_one_long_prefill() -> None:
    """The two visible functions agree: a token decoded against the cache has the logits it has in
    the prompt."""
    engine = engine_of(1, MODEL)
    token_ids = [5, 80, 13, 200, 7]
    whole, _ = engine.prefill(token_ids)
    logits, cache = engine.prefill(token_ids[:3])
    for token_id in token_ids[3:]:
        logits = engine.decode(token_id, cache)
    assert cache.get_seq_length() == 5
    assert torch.allclose(logits, whole, atol=1e-4)
    other, _ = engine.prefill([6, *token_ids[1:]])
    assert not torch.allclose(other, whole, atol=1e-2), "the first token must matter"
