"""Part 09's own invariants: ranks change where a model is computed, and never what."""

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.models.architecture import ModelConfig
from common.models.checkpoint import load_config
from common.models.weight_slices import open_weights
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
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
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_json: str
) -> Callable[[str], str]:
    root = tmp_path_factory.mktemp("models")

    def find(name: str) -> str:
        folder = root / name
        return str(
            folder if folder.is_dir() else write_model(folder, tokenizer_json, **MODELS[name][0])
        )

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


# In the short form each spread with one or two of the modes, and all modes.
SHORT = {(*spread, (2 * i + more) % 6) for i, spread in enumerate(SPREAD) for more in range(2)}
SHORT -= {(name, size, mode) for name, size, mode in SHORT if size > 4 and mode > 3}


def every_case() -> list[Any]:
    cases = [(*spread, mode) for spread in SPREAD for mode in range(len(MODES))]
    return [pytest.param(*c, marks=[] if c in SHORT else pytest.mark.long) for c in cases]


@pytest.mark.parametrize(("name", "size", "mode"), every_case())
def test_schedules(
    name: str, size: int, mode: int, folder_of: Callable, engine_with: Engines
) -> None:
    """Whatever an engine does, each request has the tokens that transformers gives it alone."""
    flags = dict(MODES[mode])
    if flags.get("speculative") == "draft" and (name != "qwen2" or size > 2):
        flags["draft_model"] = folder_of(name)  # else a stranger's drafts
    model = folder_of(name)
    engine = engine_with(model, size, **flags)
    generator = random.Random(f"{name} {size} {mode}")
    for _ in range(1 if (name, size, mode) in SHORT else 4):
        Drive(engine, model).run(some_events(generator))


@pytest.mark.long
@pytest.mark.parametrize("size", [2, 3])
def test_smollm2(size: int, engine_with: Engines) -> None:
    """9 query and 3 KV heads, of which two ranks have 6 and 2, and 3 and 1."""
    model = "smollm2-135m"
    engine = engine_with(model, size, num_blocks=60, block_size=16, max_num_batched_tokens=64)
    prompts = [[(97 * i + 7 * j) % 40000 + 100 for i in range(60)] for j in range(4)]
    greedy = [c.token_ids for c in run(engine, prompts, GREEDY)]
    assert check_greedy(model, list(zip(prompts, greedy, strict=True))).is_right
    seeded = [c.token_ids for c in run(engine, prompts, SEEDED)]
    rows = [(p, o, SEEDED) for p, o in zip(prompts, seeded, strict=True)]
    assert check_seeded(model, rows).is_right
    held = [weights for weights, _ in engine.stats()["rank_bytes"]]
    assert len(held) == size and max(held) < 4 * 134_515_008 * (0.63 if size == 2 else 0.34)


def test_options(folder_of: Callable, engine_with: Engines) -> None:
    """Penalties, biases, scores of tokens and of prompts: as one rank has them."""
    model = folder_of("llama")
    params = [
        replace(SEEDED, presence_penalty=0.7, frequency_penalty=0.4, logprobs=3),
        replace(GREEDY, prompt_logprobs=2, logprobs=0),
        replace(GREEDY, logit_bias={7: 5.0, 501: 100.0, 3: -100.0}),
        replace(SEEDED, min_p=0.05, top_k=9, prompt_logprobs=0),
    ]
    one, *others = (engine_with(model, size, num_blocks=40) for size in (1, 2, 3))
    expected = run(one, PROMPTS, params)
    assert len({tuple(c.token_ids) for c in expected}) == len(PROMPTS)
    for engine in others:
        for got, wanted in zip(run(engine, PROMPTS, params), expected, strict=True):
            assert got.token_ids == wanted.token_ids
            for name in ("logprobs", "prompt_logprobs"):
                rows, wanted_rows = (getattr(c, name) or [] for c in (got, wanted))
                for row, other in zip(rows, wanted_rows, strict=True):
                    if other is not None:
                        assert abs(row.logprob - other.logprob) < 1e-3 and row.rank == other.rank


# What must be noticed: each of these makes the tokens wrong.


def shifted_heads(shard: Any) -> Any:
    return replace(shard, heads=range(shard.heads.start - 1, shard.heads.stop - 1))


def shifted_kv_heads(shard: Any) -> Any:
    return replace(shard, kv_heads=range(shard.kv_heads.start - 1, shard.kv_heads.stop - 1))


def shifted_features(shard: Any) -> Any:
    part = shard.intermediate
    return replace(shard, intermediate=range(part.start - 8, part.stop - 8))


def bias_of_every_rank(shard: Any) -> Any:
    return replace(shard, rank=0, vocabularies=[shard.vocabulary, *shard.vocabularies[1:]])


@pytest.mark.parametrize(
    "damage", [None, shifted_heads, shifted_kv_heads, shifted_features, bias_of_every_rank]
)
def test_a_wrong_shard_is_noticed(
    damage: Any, folder_of: Callable, engine_with: Engines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last rank has heads that are not its own, or adds the bias again."""
    of = Shard.of.__func__

    def damaged(cls: Any, config: ModelConfig, rank: int = 0, size: int = 1) -> Any:
        shard = of(cls, config, rank, size)
        return damage(shard) if damage and rank == size - 1 > 0 else shard

    monkeypatch.setattr(Shard, "of", classmethod(damaged))
    model = folder_of("llama")
    engine = engine_with(model, 3, num_blocks=40)
    outputs = [completion.token_ids for completion in run(engine, PROMPTS, GREEDY)]
    seeded = [completion.token_ids for completion in run(engine, PROMPTS, SEEDED)]
    rows = [(p, o, SEEDED) for p, o in zip(PROMPTS, seeded, strict=True)]
    greedy = check_greedy(model, list(zip(PROMPTS, outputs, strict=True)))
    assert greedy.is_right == check_seeded(model, rows).is_right == (damage is None)


# Who has what.


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 64))
def test_heads_are_divided_whole(num_kv_heads: int, group: int, size: int) -> None:
    num_heads = num_kv_heads * group
    copied = size > num_kv_heads
    if copied and (size % num_kv_heads or num_heads % size):
        with pytest.raises(ValueError, match=f"tensor_parallel_size is {size}: {num_heads} query"):
            divide_heads(num_heads, num_kv_heads, size)
        return
    shares = divide_heads(num_heads, num_kv_heads, size)
    assert len(shares) == size
    assert [head for heads, _ in shares for head in heads] == list(range(num_heads))
    kv_heads = [head for _, own in shares for head in own]
    copies = size // num_kv_heads if copied else 1
    assert kv_heads == [head for head in range(num_kv_heads) for _ in range(copies)]
    for heads, own in shares:
        # As the kernels pair them: query head i of a rank with its KV head i // (heads / KV heads).
        assert len(heads) % len(own) == 0 and len(own) > 0
        ratio = len(heads) // len(own)
        assert [head // group for head in heads] == [own[i // ratio] for i in range(len(heads))]
    assert max(map(len, (own for _, own in shares))) <= -(-num_kv_heads // size)


class NoGroup:
    """A place in a group that never meets: enough to load by."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def load(folder: str, rank: int, size: int) -> tuple[Any, list[tuple[str, int, torch.Tensor]]]:
    """A rank's model, and what it has read: (name, bytes of the whole tensor, the part)."""
    from common.kernels.reference import ReferenceOps

    shape = ModelConfig.from_transformers(load_config(Path(folder)), 512)
    source, reads = open_weights(Path(folder)), []
    read = source.read

    def recorded(name: str, shape: tuple[int, ...], part: Any = ()) -> torch.Tensor:
        tensor = read(name, shape, part)
        reads.append((name, tensor.element_size() * torch.Size(shape).numel(), tensor))
        return tensor

    source.read = recorded
    where = torch.float32, torch.device("cpu"), NoGroup(rank, size)
    model = module_of(9, "model").CausalLM(shape, ReferenceOps(), source, *where)
    return model, reads


def rank_weight_bytes(config: ModelConfig, rank: int, size: int) -> int:
    """What a rank must hold, written out again: its heads, features and tokens, and the norms."""
    shares = divide_heads(config.num_heads, config.num_kv_heads, size)
    heads, kv_heads = (len(own) * config.head_dim for own in shares[rank])
    hidden, layers = config.hidden_size, config.num_layers
    features = config.intermediate_size // size + (rank < config.intermediate_size % size)
    tokens = config.vocab_size // size + (rank < config.vocab_size % size)
    layer = hidden * (2 * heads + 2 * kv_heads + 3 * features) + 2 * hidden
    layer += (heads + 2 * kv_heads) * config.has_qkv_bias + hidden * config.has_out_bias
    layer += (2 * features + hidden) * config.has_mlp_bias
    layer += 2 * config.head_dim * config.has_head_norms
    heads_of_tokens = 1 if config.tie_word_embeddings else 2
    return 4 * (layers * layer + hidden + heads_of_tokens * tokens * hidden)


@pytest.mark.parametrize("name", MODELS)
def test_each_rank_reads_its_own_and_no_more(name: str, folder_of: Callable) -> None:
    folder = folder_of(name)
    config = ModelConfig.from_transformers(load_config(Path(folder)), 512)
    whole, _ = load(folder, 0, 1)
    for size in MODELS[name][1]:
        found = [load(folder, rank, size) for rank in range(size)]
        for rank, (model, reads) in enumerate(found):
            names = [name for name, _, _ in reads]
            assert len(set(names)) == len(names), "a tensor is read twice"
            read = sum(part.nbytes for _, _, part in reads)
            assert read == model.num_bytes == rank_weight_bytes(config, rank, size)
            for name_, total, part in reads:
                if part.dim() == 2:  # a matrix is split, and KV heads at most once a rank
                    pieces = min(size, config.num_kv_heads) if "_proj" in name_ else size
                    assert part.nbytes <= total / pieces + 8 * 4 * 32 * 72, (name_, part.shape)
        # Beside biases and norms that all have, and copied KV heads, nothing is held twice.
        names = {name for name, _, part in found[0][1] if part.dim() == 2}
        held = dict.fromkeys(names, 0)
        for _, reads in found:
            for name_, _, part in reads:
                if name_ in names:
                    held[name_] += part.nbytes
        copies = max(1, size // config.num_kv_heads)
        for name_, total, _ in load(folder, 0, 1)[1]:
            if name_ in names:
                many = copies if "k_proj" in name_ or "v_proj" in name_ else 1
                assert held[name_] == many * total, name_
    assert whole.num_bytes == rank_weight_bytes(config, 0, 1)


@pytest.mark.parametrize(("name", "size"), [("llama", 2), ("qwen2", 4), ("qwen3", 3)])
def test_bytes_held_and_sent(
    name: str, size: int, folder_of: Callable, engine_with: Engines
) -> None:
    """By formula. A forward of n tokens sums n * hidden float32 twice a layer, and once for the
    embedding; each rank writes what it adds once. Rank 0 writes the packed input too, the others
    their logits. Orders, some numbers a step, do not count."""
    folder = folder_of(name)
    engine = engine_with(folder, size, num_blocks=40, max_num_batched_tokens=16)
    others = engine_with.started[-1][1].runners
    config = engine.runner.model.config
    shares = divide_heads(config.num_heads, config.num_kv_heads, size)
    numbers = config.num_layers * 2 * config.head_dim * 4 * 40 * 4
    expected = [
        [rank_weight_bytes(config, rank, size), numbers * len(kv_heads)]
        for rank, (_, kv_heads) in enumerate(shares)
    ]
    assert engine.stats()["rank_bytes"] == expected
    batches = []
    share = engine.runner.share

    def recorded(batch: Any, what: Any = None) -> None:
        batches.append((batch.shape.num_tokens, batch.shape.num_sampled, batch.packed.nbytes))
        share(batch, what)

    engine.runner.share = recorded
    groups = [engine.runner.ranks.group, *(others[r].ranks.group for r in range(1, size))]
    before = [group.num_bytes_sent for group in groups]
    run(engine, PROMPTS, replace(GREEDY, max_tokens=5))
    assert engine.stats()["num_bytes_sent"] == groups[0].num_bytes_sent
    assert {n for n, _, _ in batches} >= {4, 16}, "decoding and slices of prompts"
    tokens, sampled = sum(n for n, _, _ in batches), sum(n for _, n, _ in batches)
    sums = 4 * config.hidden_size * tokens * (1 + 2 * config.num_layers)
    vocabularies = engine.runner.model.shard.vocabularies
    for rank, group in enumerate(groups):
        own = 4 * sampled * len(vocabularies[rank]) if rank else sum(n for _, _, n in batches)
        assert group.num_bytes_sent - before[rank] == sums + own, rank


PEAK = """
import sys, threading, time
from pathlib import Path
import torch
from common.kernels import select_ops
from common.models.architecture import ModelConfig
from common.models.checkpoint import load_config
from common.models.weight_slices import open_weights
from part09.model import CausalLM

class Place:
    rank, size = 1, 2

def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon")) * 1024

torch.set_num_threads(1)
ops = select_ops(sys.argv[2], torch.device("cpu"), 1)
folder = Path(sys.argv[1])
shape = ModelConfig.from_transformers(load_config(folder), 64)
ops.prepare_weight(torch.zeros(64, 64), None)
begin, most, done = anonymous(), 0, False
def watch():
    global most
    while not done:
        most = max(most, anonymous())
        time.sleep(0.0005)
thread = threading.Thread(target=watch)
thread.start()
model = CausalLM(shape, ops, open_weights(folder), torch.float32, torch.device("cpu"), Place())
done = True
thread.join()
print(model.num_bytes, most - begin)
"""


def test_memory_while_loading(
    tmp_path: Path, tokenizer_json: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never more than a rank's slice and one tensor of the file beside it."""
    values = {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8}
    values |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    values |= {"vocab_size": 16384, "tie_word_embeddings": True}
    folder = write_model(tmp_path / "model", tokenizer_json, **values)
    largest = 4 * 16384 * 512
    for kernels in ("cpu", "reference"):
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(folder), kernels], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        held, peak = map(int, done.stdout.split())
        whole = (folder / "model.safetensors").stat().st_size
        assert whole / 2 <= held < whole * 0.501
        # Rows may stay a view of the file, which is no memory of the process.
        assert held / 3 < peak < held + largest < 0.8 * whole, (kernels, held, peak)
