"""Part 12's own invariants: keys and values that lay elsewhere are those that were computed.

Copies are slow here, by turns, so that requests come, end and are aborted while they are under way.
"""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from part12.config import EngineConfig
from part12.engine import LLMEngine

from common.kv_store import BlockCopies, Copy, Rates
from common.kv_store.block_copies import runs
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import make_engine
from common.testing.rank_threads import engine_in_threads
from common.testing.schedules import Drive, Event, known_requests

MODEL = "random:tiny-llama"
SMALL = {"block_size": 4, "num_blocks": 17, "max_num_seqs": 8, "max_num_batched_tokens": 20}
BLOCK_BYTES = 3072  # of 4 tokens
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)

Making = Callable[..., Any]


@pytest.fixture
def making() -> Iterator[Making]:
    """Makes engines, and ends them."""
    engines: list[Any] = []

    def make(**flags: Any) -> Any:
        engines.append(make_engine(12, MODEL, threads=1, kernels="reference", **(SMALL | flags)))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


def prefer(engine: Any, swap: bool) -> None:
    """Let it swap, or compute, whatever is faster here."""
    engine.connector.rates.swap_pays = lambda num_blocks, num_tokens: swap


def slow(engine: Any, seed: int = 0) -> None:
    """Let some copies take as long as some steps."""
    generator, copies = random.Random(seed), engine.runner.connector
    carry_out = copies.carry_out

    def late(*order: Any) -> int:
        time.sleep(generator.choice((0, 0, 0.002, 0.01)))
        return carry_out(*order)

    copies.carry_out = late


def damage(engine: Any, seed: int = 0) -> None:
    """Let some copies fail."""
    generator, copies = random.Random(seed), engine.runner.connector
    carry_out = copies.carry_out

    def broken(copy: Any, event: Any) -> int:
        if copy.kind == "load" and generator.random() < 0.5:
            raise OSError("no")
        return carry_out(copy, event)

    copies.carry_out = broken


class Poisoner(Drive):
    """After each step, writes large numbers where nothing lies that may be read, on both sides."""

    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.engine.has_unfinished():
                break
            super().steps(1)
            scheduler = self.engine.scheduler
            held = getattr(scheduler.cache, "key_of", {})
            free = [block for block in self.engine.kv.pool.free_blocks if block not in held]
            self.engine.kv.data[free] = 1e4
            for rows in self.engine.runner.connector.host:
                rows[self.engine.connector.host.free_blocks] = 0x7F  # infinite, or nearly
            self.num_poisoned = getattr(self, "num_poisoned", 0) + len(free)


def schedule(seed: int, num_requests: int = 16) -> list[Event]:
    generator = random.Random(seed)
    return [
        Event(
            generator.randrange(12),
            generator.randint(1, 24),
            generator.choice((None, None, generator.randrange(24))),
            generator.choice((None, None, generator.randrange(i + 1))),
            generator.randrange(6),
        )
        for i in range(num_requests)
    ]


# The same tokens.

MODES = [
    {"offload": "swap"},
    {"offload": "swap", "prefix_cache": "off"},
    {"offload": "prefix"},
    {"offload": "prefix", "prefix_cache": "radix", "offload_policy": "arc"},
    {"offload": "both"},
    {"offload": "both", "prefix_cache": "radix"},
    {"offload": "both", "speculative": "ngram"},
    {"offload": "both", "speculative": "self", "prefix_cache": "radix"},
    {"offload": "both", "speculative": "draft", "draft_model": MODEL},
    {"offload": "both", "host_kv_memory": 24 * BLOCK_BYTES},
    {"offload": "both", "host_kv_memory": 24 * BLOCK_BYTES, "offload_policy": "arc"},
]


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(map(str, mode.values())))
def test_schedules(mode: dict[str, Any], making: Making) -> None:
    engine = making(**mode)
    prefer(engine, swap=True)
    slow(engine)
    for seed in range(3):
        drive = Poisoner(engine, MODEL)
        drive.run(schedule(seed))
        assert drive.num_poisoned
    stats = engine.stats()
    assert stats["num_preemptions"] and stats["offload_bytes_load"] and stats["offload_bytes_save"]
    if mode["offload"] != "swap":
        assert stats["num_host_hits"]


@pytest.mark.parametrize("disk", [False, True])
def test_copies_that_fail_are_computed_instead(disk: bool, making: Making, tmp_path: Path) -> None:
    flags = {"disk_kv": str(tmp_path)} if disk else {}
    engine = making(offload="both", **flags)
    prefer(engine, swap=True)
    damage(engine)
    for seed in range(3):
        Poisoner(engine, MODEL).run(schedule(seed))
    assert engine.stats()["num_recomputed_tokens"]


@pytest.mark.parametrize(
    "flags",
    [{"offload": "both"}, {"offload": "swap", "speculative": "ngram"}],
    ids=["both", "swap"],
)
def test_every_rank_copies_its_heads(flags: dict[str, Any]) -> None:
    engine, others = engine_in_threads(
        12, "random:tiny-qwen3", 2, kernels="reference", **SMALL, **flags
    )
    prefer(engine, swap=True)
    slow(engine, 1)
    for seed in range(2):
        Drive(engine, "random:tiny-qwen3").run(schedule(seed))
    stats = engine.stats()
    assert stats["num_swapped_tokens"] and stats["offload_bytes_load"]
    ours, theirs = engine.runner.connector, others.runners[1].connector
    assert ours.num_host_blocks == theirs.num_host_blocks and theirs.num_bytes
    engine.shutdown()
    assert not others.errors


# What is kept, and what is not.


def burst(engine: Any) -> tuple[list[Any], dict[str, Any]]:
    """Requests of four times the pool, all at once."""
    known = [k for k in known_requests(MODEL) if len(k.prompt) > 6]
    prompts = [k.prompt for k in known for _ in range(2)]
    params = [k.cut(24, None)[0] for k in known for _ in range(2)]
    num_tokens = sum(len(prompt) + 24 for prompt in prompts)
    assert num_tokens >= 4 * engine.kv.num_blocks * engine.kv.block_size
    completions = engine.generate(prompts, params, progress=False)
    expected = [k.output[:24] for k in known for _ in range(2)]
    assert [completion.token_ids for completion in completions] == expected
    engine.check_integrity()
    return completions, engine.stats()


@pytest.mark.parametrize("offload", ["swap", "both"])
def test_a_burst_computes_nothing_twice(offload: str, making: Making) -> None:
    _, without = burst(making())
    assert without["num_preemptions"] and without["num_recomputed_tokens"]
    engine = making(offload=offload, host_kv_memory=200 * BLOCK_BYTES)
    prefer(engine, swap=True)
    _, stats = burst(engine)
    assert stats["num_preemptions"] and stats["num_swapped_tokens"]
    assert stats["num_recomputed_tokens"] == 0
    if offload == "swap":
        assert stats["num_used_host_blocks"] == 0


def test_computing_is_chosen_where_it_is_faster(making: Making) -> None:
    engine = making(offload="swap")
    engine.connector.rates.observe_copy(1, 100.0)
    with patch.object(Rates, "observe_copy"):
        _, stats = burst(engine)
    assert stats["num_preemptions"] and stats["num_recomputed_tokens"]
    assert stats["num_swapped_tokens"] == 0


def test_rates() -> None:
    rates = Rates()
    assert rates.swap_pays(1, 1), "nothing is known yet"
    rates.observe_step(100, 1.0)  # 10 ms a token
    rates.observe_copy(10, 0.1)  # 10 ms a block, 20 out and in
    assert rates.swap_pays(1, 3) and not rates.swap_pays(1, 1)
    rates.observe_step(1, 1.0)  # a step of one token says nothing about large ones
    assert not rates.swap_pays(1, 1)
    for _ in range(100):
        rates.observe_copy(10, 0.01)
    assert rates.swap_pays(1, 1), "what was long ago counts no more"


def forget(engine: Any) -> None:
    """Make the device forget what it can."""
    cache = engine.scheduler.cache
    cache.pool.free(cache.allocate(cache.num_free))


def complete(engine: Any, prompt: list[int], **more: Any) -> Any:
    [completion] = engine.generate([prompt], GREEDY, progress=False, **more)
    engine.check_integrity()
    return completion


PROMPT = [(7 * i) % 500 + 2 for i in range(30)]


@pytest.mark.parametrize("kind", ["hash", "radix"])
def test_what_the_device_forgets_is_found_on_the_host(kind: str, making: Making) -> None:
    engine = making(offload="prefix", prefix_cache=kind, num_blocks=40)
    first = complete(engine, PROMPT)
    forget(engine)
    second = complete(engine, PROMPT)
    assert first.num_cached_tokens == 0 and second.num_cached_tokens == 28
    assert first.token_ids == second.token_ids
    assert engine.stats()["num_host_hits"] == 28
    longer = complete(engine, PROMPT + second.token_ids[:9])
    assert longer.token_ids[:15] == second.token_ids[9:]


def test_the_device_comes_first(making: Making) -> None:
    engine = making(offload="prefix", num_blocks=40)
    complete(engine, PROMPT)
    complete(engine, PROMPT)
    assert engine.stats()["num_host_hits"] == 0


def test_a_salt_reaches_the_host_and_the_disk(making: Making, tmp_path: Path) -> None:
    """Clients that do not know each other's salt learn nothing by the time an answer takes."""
    engine = making(offload="prefix", num_blocks=40, disk_kv=str(tmp_path))
    assert engine.stats()["num_blocks"] == 40, "the device's, not those on the disk"
    complete(engine, PROMPT, cache_salt="ours")
    forget(engine)
    for salt in (None, "theirs"):
        assert complete(engine, PROMPT, cache_salt=salt).num_cached_tokens == 0
    forget(engine)
    assert complete(engine, PROMPT, cache_salt="ours").num_cached_tokens == 28


# A restart.


def test_prefixes_outlive_the_process(making: Making, tmp_path: Path) -> None:
    first = making(offload="prefix", num_blocks=40, disk_kv=str(tmp_path))
    answer = complete(first, PROMPT)
    first.shutdown()
    second = making(offload="prefix", num_blocks=40, disk_kv=str(tmp_path))
    again = complete(second, PROMPT)
    assert again.token_ids == answer.token_ids and again.num_cached_tokens == 28
    assert second.stats()["num_disk_hits"] == 28
    second.shutdown()
    third = making(offload="prefix", num_blocks=40, disk_kv=str(tmp_path), block_size=8)
    assert complete(third, PROMPT).num_cached_tokens == 0, "blocks of another layout"


def test_damaged_files_are_computed_instead(making: Making, tmp_path: Path) -> None:
    first = making(offload="prefix", num_blocks=40, disk_kv=str(tmp_path))
    answer = complete(first, PROMPT)
    first.shutdown()
    files = sorted(path for path in tmp_path.rglob("*") if path.stat().st_size >= BLOCK_BYTES)
    assert len(files) >= 7
    for path in files[::2]:
        data = bytearray(path.read_bytes())
        data[-100] ^= 1
        path.write_bytes(data)
    second = making(offload="prefix", num_blocks=40, disk_kv=str(tmp_path))
    again = complete(second, PROMPT)
    assert again.token_ids == answer.token_ids and again.num_cached_tokens < 28


# Who owns what, while a copy is under way.


class Held:
    """Copies that are done when they are told to be."""

    def __init__(self, engine: Any) -> None:
        self.copies, self.orders = engine.runner.connector, []
        self.is_open = False
        self.carry_out = self.copies.carry_out
        self.copies.carry_out = self.wait

    def wait(self, copy: Any, event: Any) -> int:
        self.orders.append(copy)
        deadline = time.monotonic() + 20
        while not self.is_open and time.monotonic() < deadline:
            time.sleep(0.001)
        return self.carry_out(copy, event)


def add(engine: Any, name: str, prompt: list[int], max_tokens: int = 24) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    engine.add_request(Request(name, prompt, params))


def steps(engine: Any, until: Callable[[], bool], most: int = 3000) -> list[Any]:
    outputs = []
    for _ in range(most):
        if until():
            return outputs
        outputs += engine.step()
        engine.check_integrity()
    raise AssertionError("it does not come to that")


@pytest.mark.parametrize("kind", ["hash", "radix"])
@pytest.mark.parametrize("is_load", [False, True], ids=["save", "load"])
def test_blocks_of_a_copy_are_not_given_away(is_load: bool, kind: str, making: Making) -> None:
    engine = making(offload="prefix", prefix_cache=kind)
    if is_load:
        complete(engine, PROMPT)
        forget(engine)
    held = Held(engine)
    add(engine, "first", PROMPT, 1)
    if is_load:
        steps(engine, lambda: bool(engine.scheduler.loading and held.orders))
        engine.abort("first")
    else:
        steps(engine, lambda: not engine.sequences and bool(held.orders))
    blocks = {block for table in engine.connector.held() for block in table}
    assert len(blocks) >= 7
    cache = engine.scheduler.cache
    assert cache.num_free == engine.kv.num_blocks - len(blocks)
    taken = cache.allocate(cache.num_free)
    assert not blocks & set(taken)
    cache.pool.free(taken)
    held.is_open = True
    steps(engine, lambda: not engine.has_unfinished())
    assert cache.num_free == engine.kv.num_blocks


def test_a_swapped_sequence_can_be_aborted_anywhere(making: Making) -> None:
    """Waiting for its copy out, on the host, waiting for its copy in: what it held comes free."""
    for stop in ("saving", "swapped", "loading"):
        engine = making(offload="swap")
        prefer(engine, swap=True)
        held = Held(engine)
        for i in range(4):
            add(engine, f"r{i}", PROMPT[i:])
        connector, scheduler = engine.connector, engine.scheduler
        steps(engine, lambda connector=connector: bool(connector.swapped))
        if stop != "saving":
            held.is_open = True
            steps(engine, lambda connector=connector: not connector.is_busy)
            held.is_open = stop != "loading"
        if stop == "loading":
            steps(engine, lambda scheduler=scheduler: bool(scheduler.loading))
        victims = [*scheduler.loading] if stop == "loading" else [*connector.swapped]
        for sequence in victims:
            engine.abort(sequence.request_id)
        held.is_open = True
        outputs = steps(engine, lambda engine=engine: not engine.has_unfinished())
        reasons = {o.request_id: o.finish_reason for o in outputs if o.finished}
        assert all(reasons[sequence.request_id] == "abort" for sequence in victims)
        stats = engine.stats()
        assert stats["num_used_blocks"] == stats["num_used_host_blocks"] == 0


def test_others_run_while_one_waits_for_its_keys_and_values(making: Making) -> None:
    engine = making(offload="prefix", num_blocks=40)
    complete(engine, PROMPT)
    forget(engine)
    held = Held(engine)
    add(engine, "waits", PROMPT)
    steps(engine, lambda: bool(engine.scheduler.loading))
    add(engine, "runs", PROMPT[3:])
    outputs = steps(engine, lambda: "runs" not in engine.sequences)
    assert {output.request_id for output in outputs} == {"runs"}
    assert engine.stats()["num_loading"] == 1
    held.is_open = True
    outputs = steps(engine, lambda: not engine.has_unfinished())
    assert sum(len(o.token_ids) for o in outputs if o.request_id == "waits") == 24


def test_an_engine_that_waits_records_no_empty_steps(making: Making) -> None:
    engine = making(offload="prefix", num_blocks=40)
    complete(engine, PROMPT)
    forget(engine)
    held = Held(engine)
    add(engine, "waits", PROMPT, 4)
    steps(engine, lambda: bool(engine.scheduler.loading))
    before = len(engine.trace.records())
    for _ in range(50):
        engine.step()
    assert len(engine.trace.records()) <= before + 1
    held.is_open = True
    steps(engine, lambda: not engine.has_unfinished())


def test_runs_of_neighbours_move_in_one_piece() -> None:
    copies = BlockCopies(8)
    cache = torch.arange(10 * 6, dtype=torch.float32).view(10, 1, 2, 1, 1, 3).clone()
    copies.register_kv_caches([cache])
    assert list(runs([1, 2, 3, 7, 6], [4, 5, 6, 7, 0])) == [(1, 4, 3), (7, 7, 1), (6, 0, 1)]
    before = cache.clone()
    copies.start_load_kv([Copy(1, "save", [1, 2, 3, 7, 6], [4, 5, 6, 7, 0])])
    copies.wait_until(1)
    cache[:] = -1
    copies.start_load_kv([Copy(2, "load", [9, 1], [7, 5], [None, None])])
    copies.wait_until(2)
    assert torch.equal(cache[9], before[7]) and torch.equal(cache[1], before[2])
    assert (cache[[0, 2, 3, 4, 5, 6, 7, 8]] == -1).all()
    copies.shutdown()


# Bad input.


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"offload": "disk"}, "offload must be one of off, swap, prefix, both, not 'disk'"),
        ({"offload": "prefix", "prefix_cache": "off"}, "prefix_cache must not be off"),
        ({"host_kv_memory": 1 << 20}, "host_kv_memory"),
        ({"offload": "swap", "offload_policy": "arc"}, "offload_policy"),
        ({"offload": "swap", "disk_kv": "/tmp"}, "disk_kv"),
        ({"disk_kv_memory": 1}, "disk_kv_memory has no effect without disk_kv"),
        ({"offload": "both", "disk_kv": "x", "tensor_parallel_size": 2}, "disk_kv is for one rank"),
    ],
)
def test_settings_that_cannot_be(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model=MODEL, **flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"host_kv_memory": 100}, "host_kv_memory is 100: a block takes 3072 bytes"),
        ({"disk_kv": "/proc/nothing"}, "disk_kv"),
        ({"disk_kv": "/dev/null"}, "disk_kv"),
    ],
)
def test_a_tier_that_cannot_be_had(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LLMEngine(EngineConfig(model=MODEL, num_blocks=8, block_size=4, offload="both", **flags))
