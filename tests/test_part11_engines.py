"""Part 11's engines: experts spread over ranks and over several engines give one rank's tokens.

Engines of one rank each share a process here, each with a thread of its own and gloo between them;
those with more ranks have real processes.
"""

import contextlib
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from part11.config import EngineConfig
from part11.engine import LLMEngine

from common.distributed.group import RankError
from common.models.checkpoint import load_config, resolve
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import make_engine

QWEN, MIXTRAL = "random:tiny-qwen3-moe", "random:tiny-mixtral"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SEEDED = SamplingParams(seed=3, temperature=0.8, top_p=0.95, max_tokens=12, ignore_eos=True)
PROMPTS = [[(7 * i + n) % 500 + 2 for i in range(n)] for n in (1, 5, 12, 30)] + [[3, 4, 5] * 6]
SMALL: dict[str, Any] = {"threads": 1, "num_blocks": 64, "block_size": 4, "max_num_seqs": 8}
numbers = itertools.count()


def run_each(engines: list[Any], work: Callable[[int, Any], Any]) -> list[Any]:
    """What `work(number, engine)` returns, side by side; the first exception is raised."""
    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(work, range(len(engines)), engines))


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Any]]:
    folder = tmp_path_factory.mktemp("meet")
    load_config(resolve(QWEN))  # imports transformers, which several threads cannot at a time

    def start(num_engines: int, model: str = QWEN, **flags: Any) -> list[Any]:
        flags = SMALL | {"enable_expert_parallel": True} | flags
        if num_engines > 1:
            address = str(folder / str(next(numbers)))
            flags |= {"data_parallel_size": num_engines, "data_parallel_address": address}
        own: list[dict[str, Any]] = [{"data_parallel_rank": i} for i in range(num_engines)]
        engines = run_each(own, lambda _, mine: make_engine(11, model, **(flags | mine)))
        assert not list(folder.iterdir())  # they have met
        return engines

    return start


@contextlib.contextmanager
def closing(engines: list[Any]) -> Iterator[list[Any]]:
    try:
        yield engines
    finally:
        for engine in engines:
            engine.shutdown()


def complete(engine: Any, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    outputs = engine.generate(prompts, params, progress=False)
    engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 0
    return [output.token_ids for output in outputs]


def check(model: str, engines: list[Any]) -> None:
    """Engines with unequal work, then one alone: all tokens are those of transformers' model."""
    for params in (GREEDY, SEEDED):
        work = [partial(complete, prompts=PROMPTS[i:], params=params) for i in range(len(engines))]
        outputs = run_each(engines, lambda i, engine, work=work: work[i](engine))
        outputs.append(complete(engines[-1], PROMPTS, params))
        for number, theirs in enumerate(outputs):
            prompts = PROMPTS[number % len(engines) :]
            if params.temperature:
                rows = [(p, o, params) for p, o in zip(prompts, theirs, strict=False)]
                verdict = check_seeded(model, rows)
            else:
                verdict = check_greedy(model, list(zip(prompts, theirs, strict=False)))
            assert verdict.is_right, verdict
    loads = [np.array(engine.stats()["expert_load"]) for engine in engines]
    k = engines[0].runner.model.config.num_experts_per_tok
    for load in loads:
        assert load.sum(1).all() and not (load.sum(1) % k).any(), "not k for each token"


@pytest.mark.parametrize(
    ("model", "num_engines", "flags"),
    [
        (QWEN, 1, {}),
        (QWEN, 2, {}),
        (MIXTRAL, 2, {"ep_backend": "all_to_all"}),
        (
            QWEN,
            2,
            {"ep_backend": "all_to_all", "max_num_batched_tokens": 7, "prefix_cache": "radix"},
        ),
        (QWEN, 2, {"ep_backend": "all_to_all", "speculative": "ngram", "prompt_lookup_min": 1}),
        (QWEN, 2, {"speculative": "self", "draft_layers": 2}),
        (MIXTRAL, 2, {"speculative": "draft", "draft_model": QWEN}),
        (MIXTRAL, 4, {"ep_backend": "all_to_all", "num_redundant_experts": 4}),
        (QWEN, 4, {"eplb": True, "eplb_interval": 5, "num_blocks": 17}),
    ],
    ids=str,
)
def test_tokens_are_those_of_one_rank(
    start: Callable[..., list[Any]], model: str, num_engines: int, flags: dict[str, Any]
) -> None:
    with closing(start(num_engines, model, **flags)) as engines:
        check(model, engines)
        experts = engines[0].runner.model.experts
        moves = [engine.stats()["num_expert_moves"] for engine in engines]
        assert len(set(moves)) == 1 and (moves[0] > 0) == (experts.interval is not None)


RANKS = [
    {"ep_backend": "all_to_all", "num_redundant_experts": 4, "eplb": True, "eplb_interval": 5},
    {"enable_expert_parallel": False},
]


@pytest.mark.parametrize("flags", RANKS, ids=str)
def test_ranks_of_one_engine(start: Callable[..., list[Any]], flags: dict[str, Any]) -> None:
    """Experts whole on two ranks, and by their features; each rank has half of the experts' bytes
    and of the copies'."""
    model = QWEN
    with closing(start(1, model, tensor_parallel_size=2, **flags)) as [engine]:
        outputs = complete(engine, PROMPTS, GREEDY)
        assert check_greedy(model, list(zip(PROMPTS, outputs, strict=True))).is_right
        first, second = engine.stats()["rank_bytes"]
        assert first == second
        shape = engine.runner.model.config
        expert = 3 * shape.hidden_size * shape.moe_intermediate_size * 4  # bytes in float32
        copies = flags.get("num_redundant_experts", 0) // 2
        own = len(shape.sparse_layers) * (shape.num_experts // 2 + copies) * expert
        with closing(start(1, model)) as [whole]:
            rest = whole.stats()["weight_bytes"] - 2 * own
        replicated = first[0] - own
        assert replicated < 0.6 * (rest + 2 * len(shape.sparse_layers) * copies * expert)


def children(engine: Any) -> list[int]:
    return [child.pid for child in engine.runner.ranks.children.processes]


@pytest.mark.parametrize(
    ("how", "timeout"),
    [(signal.SIGKILL, 30.0), pytest.param(signal.SIGSTOP, 10.0, marks=pytest.mark.long)],
)
def test_two_engines_of_two_ranks(
    start: Callable[..., list[Any]], how: signal.Signals, timeout: float
) -> None:
    """Until a rank of the second is killed, or stands still: both end, and say why."""
    flags: dict[str, Any] = {"num_redundant_experts": 4, "eplb": True, "eplb_interval": 5}
    with closing(start(2, tensor_parallel_size=2, rank_timeout=timeout, **flags)) as engines:
        assert engines[0].runner.everyone.size == 4
        check(QWEN, engines)
        everyone = [pid for engine in engines for pid in children(engine)]
        os.kill(children(engines[1])[0], how)
        begin = time.monotonic()
        for engine in engines:
            with pytest.raises(RankError) as error:
                engine.generate(PROMPTS, replace(GREEDY, max_tokens=200), progress=False)
            assert "\n" not in str(error.value)
            assert engine.problem() == str(error.value)
        assert time.monotonic() - begin < 2 * timeout
    for pid in everyone:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_an_engine_that_shuts_down_ends_the_other(start: Callable[..., list[Any]]) -> None:
    with closing(start(2)) as engines:
        run_each(engines, lambda _, engine: complete(engine, PROMPTS, GREEDY))
        engines[0].shutdown()
        deadline = time.monotonic() + 10
        while engines[1].problem() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        assert engines[1].problem() == "engine 0 of 2 has shut down", "noticed while idle"
        with pytest.raises(RankError, match=r"^engine 0 of 2 has shut down$"):
            complete(engines[1], PROMPTS, GREEDY)
        assert engines[0].problem() is None


# Bad input.


def test_engines_that_differ_are_refused(tmp_path: Path) -> None:
    flags = SMALL | {"enable_expert_parallel": True, "data_parallel_size": 2}
    flags |= {"model": QWEN, "data_parallel_address": str(tmp_path / "meet")}

    def refused(number: int, max_num_seqs: int) -> str:
        own = {"data_parallel_rank": number, "max_num_seqs": max_num_seqs}
        with pytest.raises(ValueError) as error:
            LLMEngine(EngineConfig(**(flags | own)))
        return str(error.value)

    with ThreadPoolExecutor(2) as pool:
        messages = list(pool.map(refused, (0, 1), (8, 16)))
    assert messages == ["max_num_seqs differs: 8 on rank 0, 16 on rank 1"] * 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"tensor_parallel_size": 3, "enable_expert_parallel": True},
            "tensor_parallel_size is 3: 4 query heads and 2 KV heads cannot be divided so",
        ),
        (
            {"data_parallel_size": 3, "data_parallel_address": "/nowhere/meet"},
            "num_experts is 8: does not divide among 3 ranks; num_redundant_experts 1 would",
        ),
        (
            {"num_redundant_experts": 1},
            "num_redundant_experts is 1: 8 experts on 1 ranks have 0 further copies at most",
        ),
        ({"model": "random:tiny-llama"}, "enable_expert_parallel is on: random:tiny-llama has no"),
        ({"data_parallel_size": 2}, "data_parallel_size is 2: data_parallel_address must be given"),
        (
            {"data_parallel_rank": 1, "data_parallel_address": "/nowhere/meet"},
            "data_parallel_rank is 1: data_parallel_size is 1",
        ),
        (
            {"enable_expert_parallel": False, "ep_backend": "all_to_all"},
            "ep_backend is 'all_to_all': it needs enable_expert_parallel to be True, not False",
        ),
        (
            {"eplb_interval": 10},
            "eplb_interval is 10: it needs eplb to be True, not False",
        ),
    ],
)
def test_what_cannot_be_is_said_at_once(flags: dict[str, Any], message: str) -> None:
    flags = SMALL | {"model": QWEN, "enable_expert_parallel": True} | flags
    with pytest.raises(ValueError) as error:
        LLMEngine(EngineConfig(**flags))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
