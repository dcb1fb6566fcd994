"""Part 03's exercises: these fail until you do them. Run with `pytest -m exercise`."""

from typing import Any

import pytest

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_seeded
from common.testing.parts import module_of

pytestmark = pytest.mark.exercise
MODEL = "random:tiny-llama"


def engine_with(**flags: Any) -> Any:
    config = module_of(3, "config").EngineConfig(model=MODEL, threads=1, **flags)
    return module_of(3, "engine").LLMEngine(config)


def test_the_newest_free_block_first() -> None:
    """Requests one after another touch the whole pool, or the same few blocks again and again."""
    pool_class = module_of(3, "kv_cache").BlockPool
    pool = pool_class(6, newest_first=True)
    a, b = pool.allocate(2), pool.allocate(3)
    pool.free(a)
    pool.free(b)
    assert pool.allocate(4) == [b[0], b[1], b[2], a[0]], "the last to become free is b's first"
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    touched = {}
    for newest_first in (False, True):
        engine = engine_with(block_size=4, num_blocks=16)
        engine.kv.pool = pool_class(16, newest_first=newest_first)
        for number in range(8):
            engine.generate([[number + 2, 3, 4]], params, progress=False)
        allocated = [record.allocated for record in engine.trace.records()]
        touched[newest_first] = {block for one in allocated for t in one.values() for block in t}
        engine.kv.pool.check_integrity([])
    assert len(touched[False]) == 16 and len(touched[True]) == 2


def test_a_fork_shares_full_blocks() -> None:
    """Two choices of one prompt: its full blocks are stored once, and neither writes into the
    other's."""
    engine = engine_with(block_size=4, num_blocks=16)
    prompt = [5, 6, 7, 8, 9, 10, 11, 12, 13]  # two full blocks, and one token
    params = SamplingParams(seed=1, max_tokens=7, ignore_eos=True)  # 16 tokens: four blocks
    engine.add_request(Request("a", prompt, params))
    [first] = engine.step()
    engine.fork("a", "b", seed=2)
    engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 4 + 2, "the two full blocks are shared"
    tokens: dict[str, list[int]] = {"a": [], "b": []}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    assert len(tokens["a"]) == len(tokens["b"]) == 6 and tokens["a"] != tokens["b"]
    begin = prompt + first.token_ids
    seeded = [SamplingParams(seed=seed, ignore_eos=True) for seed in (1, 2)]
    rows = list(zip([begin] * 2, tokens.values(), seeded, strict=True))
    verdict = check_seeded(MODEL, rows)
    assert verdict.is_right, verdict
    assert engine.kv.pool.num_free == 16
