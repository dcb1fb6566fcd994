"""Part 03's own invariants: the block pool, static batches, what a batch holds, model shapes."""

import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy
from common.testing.parts import PARTS, distinct_files, engine_of, module_of

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)


class PoolMachine(RuleBasedStateMachine):
    """Blocks taken, shared and given back in any order: none is lost, none has a wrong owner."""

    part = 3

    def __init__(self) -> None:
        super().__init__()
        self.pool = module_of(self.part, "kv_cache").BlockPool(12)
        self.tables: list[list[int]] = []

    @rule(count=st.integers(0, 14))
    def allocate(self, count: int) -> None:
        free = 12 - sum(map(len, self.tables))
        assert self.pool.can_allocate(count) == (count <= free)
        if count <= free:
            expected = list(self.pool.free_blocks)[:count]
            table = self.pool.allocate(count)
            assert table == expected, "blocks leave in the order in which they became free"
            self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.free(table)
        freed = list(self.pool.free_blocks)
        assert freed[len(freed) - len(table) :] == table[::-1]

    @invariant()
    def whole(self) -> None:
        self.pool.check_integrity(self.tables)


PoolMachine.TestCase.settings = settings(max_examples=50, stateful_step_count=30)
test_block_pool = PoolMachine.TestCase


def test_integrity_check_can_fail() -> None:
    pool = module_of(3, "kv_cache").BlockPool(4)
    table = pool.allocate(2)
    for wrong in ([], [table[:1]], [table, table], [[3]]):
        with pytest.raises(AssertionError, match="owners"):
            pool.check_integrity(wrong)
    pool.free(table)
    with pytest.raises(AssertionError, match="free already"):
        pool.free(table)
    with pytest.raises(AssertionError, match="5 blocks wanted"):
        pool.allocate(5)


def drain(engine: Any) -> dict[str, list[int]]:
    results: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            results.setdefault(output.request_id, []).extend(output.token_ids)
        engine.check_integrity()
    return results


def test_a_batch_is_what_the_blocks_hold() -> None:
    """Ten blocks of four tokens: 3 + 5 tokens reserve two each, so five sequences run at once; the
    sixth waits until all five are done, also those that finished sooner."""
    engine = engine_of(3, MODEL, block_size=4, num_blocks=10, max_num_seqs=8)
    for i in range(6):
        engine.add_request(Request(f"r{i}", [2 + i, 3, 4], replace(GREEDY, max_tokens=5)))
    engine.step()
    assert engine.stats()["num_running"] == 5 and engine.stats()["num_waiting"] == 1
    assert engine.stats()["num_used_blocks"] == 10
    engine.abort("r1")
    engine.step()
    assert engine.stats()["num_used_blocks"] == 10, "a static batch keeps its blocks to the end"
    record = engine.trace.records()[-1]
    assert len(record.scheduled) == 5
    results = drain(engine)
    assert set(results) == {f"r{i}" for i in (0, 2, 3, 4, 5)}
    assert engine.kv.pool.num_free == 10


def test_a_request_that_can_never_fit_is_refused_with_the_numbers() -> None:
    """The context is what the pool holds, so whatever is admitted can run alone to its end."""
    engine = engine_of(3, MODEL, block_size=4, num_blocks=10, max_num_seqs=8)
    with pytest.raises(ValueError, match="max_tokens is 8, but a prompt of 33 tokens leaves 7"):
        engine.add_request(Request("big", [2] * 33, GREEDY))
    with pytest.raises(ValueError, match="prompt has 40 tokens; with a context of 40 tokens"):
        engine.add_request(Request("bigger", [2] * 40, GREEDY))
    assert not engine.has_unfinished()
    config = module_of(3, "config").EngineConfig
    with pytest.raises(ValueError, match="max_model_len is 41; the KV cache holds 40 tokens"):
        module_of(3, "engine").LLMEngine(
            config(model=MODEL, block_size=4, num_blocks=10, max_model_len=41)
        )


def test_one_block_is_enough_for_one_small_request() -> None:
    engine = engine_of(3, MODEL, block_size=16, num_blocks=1)
    outputs = engine.generate([[2, 3], [4]], GREEDY, progress=False)
    pairs = [([2, 3], outputs[0].token_ids), ([4], outputs[1].token_ids)]
    assert check_greedy(MODEL, pairs).is_right


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_block_size_does_not_matter(block_size: int) -> None:
    engine = engine_of(3, MODEL, block_size=block_size, num_blocks=2048 // block_size)
    generator = random.Random(block_size)
    prompts = [[generator.randrange(2, 512) for _ in range(n)] for n in (1, 2, 15, 16, 17, 60)]
    outputs = engine.generate(prompts, replace(GREEDY, max_tokens=20), progress=False)
    pairs = [(p, c.token_ids) for p, c in zip(prompts, outputs, strict=True)]
    verdict = check_greedy(MODEL, pairs)
    assert verdict.is_right, verdict
    for damage in ("cut", "shift"):
        assert not check_greedy(MODEL, pairs[1:], damage).is_right


def test_stale_blocks_do_not_leak_into_the_next_sequence() -> None:
    """The cache is filled with huge values between two runs; nothing of them may be read."""
    engine = engine_of(3, MODEL, block_size=8, num_blocks=32)
    before = engine.generate([[2, 3, 4], [5] * 20], GREEDY, progress=False)
    engine.kv.data.fill_(1e4)
    after = engine.generate([[2, 3, 4], [5] * 20], GREEDY, progress=False)
    assert [c.token_ids for c in before] == [c.token_ids for c in after]


def tiny_config(kind: str) -> Any:
    """A transformers config of one family, with what is special about it."""
    import transformers

    common = {
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    scaling = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }

    def windowed(config_class: Any, num_full_layers: int) -> Any:
        window = {"use_sliding_window": True, "sliding_window": 8}
        return config_class(**common, **window, max_window_layers=num_full_layers)

    return {
        "llama-tied": lambda: transformers.LlamaConfig(**common, tie_word_embeddings=True),
        "llama-biases": lambda: transformers.LlamaConfig(**common, attention_bias=True),
        "llama-3.1": lambda: transformers.LlamaConfig(**common, rope_parameters=scaling),
        "qwen2": lambda: transformers.Qwen2Config(**common),
        "qwen3": lambda: transformers.Qwen3Config(**common, head_dim=32),
        "mistral": lambda: transformers.MistralConfig(**common, sliding_window=None),
        "mistral-window": lambda: transformers.MistralConfig(**common, sliding_window=20),
        "qwen2-window-on-all": lambda: windowed(transformers.Qwen2Config, 0),
        "qwen2-window-on-some": lambda: windowed(transformers.Qwen2Config, 1),
        "qwen3-window-on-none": lambda: windowed(transformers.Qwen3Config, 2),
    }[kind]()


KINDS = (
    "llama-tied", "qwen3", "mistral-window", "llama-biases", "llama-3.1", "qwen2", "mistral",
    "qwen2-window-on-all", "qwen2-window-on-some", "qwen3-window-on-none",
)  # fmt: skip
MODELS = distinct_files("model.py")


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        pytest.param(part, kind, marks=[] if is_short else pytest.mark.long)
        for part in MODELS
        for kind in KINDS
        # In the short form, between the first part and the last, the three that differ most.
        for is_short in [part in (MODELS[0], MODELS[-1]) or kind in KINDS[:3]]
    ],
)
def test_model_families(part: int, kind: str, tmp_path: Any) -> None:
    """A checkpoint written by transformers, read by ours: the same tokens."""
    import transformers

    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.5)
            elif "norm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(tmp_path)
    config = module_of(part, "config").EngineConfig(model=str(tmp_path), num_blocks=64)
    tokenizer_of = module_of(part, "engine").Tokenizer
    original, tokenizer_of.load = tokenizer_of.load, classmethod(lambda cls, folder: None)
    try:
        engine = module_of(part, "engine").LLMEngine(config)
    finally:
        tokenizer_of.load = original
    prompts = [[5], [7, 8, 9], list(range(2, 90))]
    outputs = engine.generate(prompts, replace(GREEDY, max_tokens=30), progress=False)
    pairs = [(p, c.token_ids) for p, c in zip(prompts, outputs, strict=True)]
    verdict = check_greedy(str(tmp_path), pairs)
    assert verdict.num_tokens == 90 and verdict.is_right, verdict
    assert not check_greedy(str(tmp_path), pairs[1:], "shift").is_right


def test_unsupported_models_are_refused_by_name(tmp_path: Any) -> None:
    from common.models.errors import ModelError

    model_config = module_of(3, "model").ModelConfig
    import transformers

    with pytest.raises(ModelError, match="model_type is 'gpt2'"):
        model_config.from_transformers(transformers.GPT2Config(), 100)
    yarn = tiny_config("llama-tied")
    yarn.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ModelError, match="rope_type is 'yarn'"):
        model_config.from_transformers(yarn, 100)


# A batch is a snapshot: tensors and plain numbers.


def inside(thing: Any, seen: set[int] | None = None) -> Iterator[Any]:
    """A thing and all that it holds: attributes, items, what functions have captured."""
    seen = set() if seen is None else seen
    if id(thing) in seen:
        return
    seen.add(id(thing))
    yield thing
    if isinstance(thing, str | bytes | int | float | torch.Tensor | np.ndarray | type | ModuleType):
        return
    held: list[Any] = [*vars(thing).values()] if hasattr(thing, "__dict__") else []
    if isinstance(thing, dict):
        held += [*thing.keys(), *thing.values()]
    elif isinstance(thing, list | tuple | set | frozenset | deque):
        held += thing
    elif isinstance(thing, FunctionType):
        held += [cell.cell_contents for cell in thing.__closure__ or ()]
    for part in held:
        yield from inside(part, seen)


def test_inside_finds_what_lies_deep() -> None:
    @dataclass
    class Box:
        content: Any

    needle = Box(1)
    wrappings = (Box(needle), {needle.content: [needle]}, (Box({"a": deque([needle])}),))
    for thing in (*wrappings, lambda: needle):
        assert any(found is needle for found in inside(thing))
    assert not any(found is needle for found in inside([Box(2), "needle", {1: 2.0}]))


BATCHES: list[tuple[int, dict[str, Any]]] = [(part, {}) for part in PARTS if part >= 3] + [
    (8, {"speculative": "ngram", "prompt_lookup_min": 1}),
    (8, {"speculative": "self", "draft_layers": 1}),
    (8, {"speculative": "draft", "draft_model": MODEL}),
]


@pytest.mark.parametrize(("part", "flags"), BATCHES, ids=str)
def test_a_batch_holds_no_sequence(
    part: int, flags: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device may read it while the host changes the sequences. Whatever they ask for."""
    engine = engine_of(part, MODEL, threads=1, num_blocks=64, **flags)
    sequence_class = module_of(part, "sequence").Sequence
    forward, batches = engine.runner.forward, []

    def look(batch: Any, *drafter: Any) -> Any:
        batches.append(batch)
        assert not [x for x in inside(batch) if isinstance(x, sequence_class)]
        return forward(batch, *drafter)

    monkeypatch.setattr(engine.runner, "forward", look)
    if flags:  # as many drafts as there is room for
        lengths = engine.speculator.lengths
        monkeypatch.setattr(lengths, "choose", lambda sequences, limits, num_tokens: list(limits))
    penalties = {"presence_penalty": 1.0, "frequency_penalty": 0.5}
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"seed": 3, "logprobs": 2, **penalties},
        {"logit_bias": {5: 100.0}, "min_tokens": 4},  # a token of the prompt: there are drafts
    ]
    if part >= 4:
        kinds += [{"prompt_logprobs": 2}, {"n": 2}]
    params = [SamplingParams(max_tokens=8, ignore_eos=True, **kind) for kind in kinds]
    engine.generate([[3, 4, 5] * 6] * len(kinds), params, progress=False)
    assert len(batches) >= 3
    assert any(len(batch.logits_indices) > 1 for batch in batches)
    if part >= 4:
        assert any(batch.prompts for batch in batches)
    if part >= 5:
        assert any(batch.has_penalties for batch in batches)
        assert any(batch.joining is not None for batch in batches)
        assert any(batch.sampling.biases is not None for batch in batches)
    if flags:
        assert any(any(batch.draft_lengths) for batch in batches)
    assert not [x for batch in batches for x in inside(batch) if isinstance(x, sequence_class)]
