"""Part 07's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"
PROMPT = [(7 * i) % 500 + 2 for i in range(30)]
KINDS = ["hash", "radix"]


def engine_with(kind: str = "hash", **flags: Any) -> Any:
    flags = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8} | flags
    config = module_of(7, "config").EngineConfig(model=MODEL, threads=1, prefix_cache=kind, **flags)
    return module_of(7, "engine").LLMEngine(config)


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def found(engine: Any, prompt: list[int]) -> int:
    """How many tokens of a prompt the cache has for it."""
    [completion] = engine.generate([prompt], greedy(1), progress=False)
    engine.check_integrity()
    return completion.num_cached_tokens


def finish(engine: Any) -> dict[str, list[int]]:
    """The tokens of each request, in the order in which they had their first."""
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
    return tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_reset_forgets_all_or_nothing(kind: str) -> None:
    """While somebody runs it does nothing and says so."""
    engine = engine_with(kind)
    assert (found(engine, PROMPT), found(engine, PROMPT)) == (0, 28)
    engine.add_request(Request("a", PROMPT[:8] + [3] * 9, greedy(6)))
    engine.step()
    assert engine.reset_prefix_cache() is False
    engine.check_integrity()
    assert len(finish(engine)["a"]) == 6
    assert found(engine, PROMPT) == 28, "a reset that was refused has lost something"
    assert engine.reset_prefix_cache() is True
    engine.check_integrity()
    assert engine.scheduler.cache.num_free == engine.stats()["num_blocks"]
    assert engine.scheduler.cache.pool.num_free == engine.stats()["num_blocks"]
    assert (found(engine, PROMPT), found(engine, PROMPT)) == (0, 28)
    assert engine.reset_prefix_cache() is True, "also when it was used again"


@pytest.mark.parametrize("kind", KINDS)
def test_who_finds_most_joins_first(kind: str) -> None:
    """And who finds equally much in the order in which they came; by default nobody overtakes."""
    prompts = {
        "stranger": [9] * 20,
        "end": PROMPT[:9] + [8] * 11,
        "other": [7] * 20,
        "all": PROMPT[:29],
        "half": PROMPT[:17] + [5] * 3,
    }
    longest_first = ["all", "half", "end", "stranger", "other"]
    for flags, order in (({}, list(prompts)), ({"schedule_policy": "lpm"}, longest_first)):
        engine = engine_with(kind, max_num_seqs=1, **flags)
        found(engine, PROMPT)
        for name, prompt in prompts.items():
            engine.add_request(Request(name, prompt, greedy(3)))
        tokens = finish(engine)
        assert list(tokens) == order
        for name, prompt in prompts.items():
            assert check_greedy(MODEL, [(prompt, tokens[name])]).is_right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_async", [False, True])
def test_duplicates_are_merged(kind: str, is_async: bool) -> None:
    """Two that come at once compute the same twice, and keep it once."""
    engine = engine_with(kind, merge_duplicates=True)
    engine.num_in_flight = 2 if is_async else 1
    for name in "ab":
        engine.add_request(Request(name, PROMPT, greedy(20)))
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    while len(tokens["b"]) < 12:
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    a, b = (engine.sequences[name].block_table for name in "ab")
    assert a[:10] == b[:10], "40 tokens and more are computed and read"
    assert a[-1] != b[-1], "the last block is still written to"
    assert engine.stats()["num_used_blocks"] <= 10 + 2 * 2
    engine.add_request(Request("c", [4] * 60, greedy(8)))  # gets the blocks that became free
    rest = finish(engine)
    for name, prompt in (("a", PROMPT), ("b", PROMPT), ("c", [4] * 60)):
        own = tokens.get(name, []) + rest[name]
        assert check_greedy(MODEL, [(prompt, own)]).is_right, name
    assert engine.stats()["num_used_blocks"] == 0
    assert found(engine, PROMPT) == 28
