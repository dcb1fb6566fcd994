"""Part 09's own invariants: ranks change where a model is computed, and never what."""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.sampling import SamplingParams
from common.testing.parts import module_of
from common.testing.rank_threads import ThreadRanks, engine_in_threads
from common.testing.schedules import Drive, Event

Shard = module_of(9, "tensor_parallel").Shard
divide_heads = module_of(9, "tensor_parallel").divide_heads

BASE = {
    "vocab_size": 512,
    "hidden_size": 72,
    "intermediate_size": 161,  # divided by 7 and 23
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
    "initializer_range": 0.2,
    "dtype": "float32",
}
# Kinds of heads, biases and windows; the ranks they are spread over.
MODELS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "llama": (
        {
            "model_type": "llama",
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "head_dim": 16,
            "attention_bias": True,  # of the output too, as the MLP's: added once, not by each rank
            "mlp_bias": True,
            "tie_word_embeddings": True,
        },
        (2, 3, 9),
    ),
    "qwen2": (
        {
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "hidden_size": 64,
        },
        (2, 4),
    ),
    "qwen3": (
        {
            "model_type": "qwen3",
            "num_attention_heads": 6,
            "num_key_value_heads": 3,
            "head_dim": 32,
            "vocab_size": 515,  # divided by 5
        },
        (2, 3, 6),
    ),
    "mistral": (
        {
            "model_type": "mistral",
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "sliding_window": 11,
        },
        (2, 8),
    ),
}
SPREAD = [(name, size) for name, (_, sizes) in MODELS.items() for size in sizes]
POOL = {"num_blocks": 17, "block_size": 4, "max_num_seqs": 8}
# What each engine does meanwhile. Every pool is too small for all that want to run.
MODES: list[dict[str, Any]] = [
    {"prefix_cache": "hash", "max_num_batched_tokens": 7},
    {"prefix_cache": "radix", "num_blocks": 70, "block_size": 1},
    {"speculative": "ngram", "prompt_lookup_min": 1, "max_num_batched_tokens": 16},
    {"speculative": "self", "draft_layers": 2, "prefix_cache": "radix"},
    {"speculative": "draft", "draft_model": "random:tiny-qwen3", "max_num_batched_tokens": 9},
    {"prefix_cache": "off", "num_blocks": 5, "block_size": 16, "max_num_batched_tokens": 1},
]
PROMPTS = [[(7 * i) % 500 + 2 for i in range(count)] for count in (1, 5, 30)] + [[3, 4, 5] * 6]
GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
SEEDED = SamplingParams(seed=3, temperature=0.8, top_p=0.95, max_tokens=20, ignore_eos=True)


def write_model(folder: Path, tokenizer_json: str, **values: Any) -> Path:
    """A folder with a model of this shape, with weights that make every part of it matter."""
    import transformers

    config = transformers.AutoConfig.for_model(**BASE | values)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    state = {
        name: torch.randn(tensor.shape) * 0.2 + name.endswith("norm.weight")
        for name, tensor in model.state_dict().items()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(BASE | values))
    (folder / "tokenizer.json").write_text(tokenizer_json)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("models")

    def find(name: str) -> str:
        folder = root / name
        return str(folder if folder.is_dir() else write_model(folder, tokenizer_json, **MODELS[name][0]))

    return find


class Engines:
    """Engines of the test, which end with it."""

    def __init__(self) -> None:
        self.started: list[tuple[Any, ThreadRanks]] = []

    def __call__(self, model: str, size: int, **flags: Any) -> Any:
        engine, others = engine_in_threads(9, model, size, **POOL | flags)
        self.started.append((engine, others))
        return engine

    def close(self) -> None:
        for engine, others in self.started:
            engine.shutdown()
            for thread in others.threads:
                thread.join(20)
            assert not others.errors and not any(t.is_alive() for t in others.threads)


@pytest.fixture
def engine_with() -> Iterator[Engines]:
    engines = Engines()
    yield engines
    engines.close()


def run(engine: Any, prompts: list[list[int]], params: Any, **more: Any) -> list[Any]:
    completions = engine.generate(prompts, params, progress=False, **more)
    engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 0
    return completions


# The same tokens.


def some_events(generator: random.Random) -> list[Event]:
    """Requests that come while others run, stop early, and are aborted."""
    return [
        Event(
            generator.randrange(12),
            generator.randint(1, 24),
            generator.choice((None, None, generator.randrange(24))),
            generator.choice((None, None, generator.randrange(i + 1))),
            generator.randrange(9),
        )
        for i in range(12)
    ]


@pytest.mark.parametrize("mode", range(len(MODES)))
@pytest.mark.parametrize(("name", "size"), SPREAD)
def test_schedules(
    name: str, size: int, mode: int, folder_of: Callable, engine_with: Engines
) -> None:
    """Whatever an engine does, each request has the tokens that transformers gives it alone."""
    flags = dict(MODES[mode])
    if flags.get("speculative") == "draft" and (name != "qwen2" or size > 2):
        flags["draft_model"] = folder_of(name)
    model = folder_of(name)
    engine = engine_with(model, size, **flags)
    generator = random.Random(f"{name} {size} {mode}")
    for _ in range(3):
        Drive(engine, model).run(some_events(generator))
