"""Wrong and hostile model folders, in every way that parts load one: a clear line before a request.

Parts 01 and 02 have transformers load the weights, parts from 03 on read them themselves. Each
case is one folder that is whole as a file and wrong as a model. `test_model_files` has the files
that are not whole.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.models import checkpoint
from common.models.checkpoint import (
    MAX_CONTEXT,
    context_length,
    iter_weights,
    load_config,
    load_transformers_model,
    resolve,
)
from common.models.errors import ModelError
from common.models.expert_names import split_experts
from common.models.presets import PRESETS
from common.models.weight_files import Header
from common.testing.parts import PARTS, distinct_files, module_of

LLAMA, QWEN3 = PRESETS["tiny-llama"], PRESETS["tiny-qwen3"]
CONFIGS = {
    "llama": LLAMA,
    "qwen2": LLAMA | {"model_type": "qwen2"},
    "qwen3": QWEN3,
    "mistral": LLAMA | {"model_type": "mistral"},
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
OWN_PARTS = sorted({*distinct_files("model.py"), PARTS[-1]})
ATTENTION = "model.layers.1.self_attn"

Tensors = dict[str, torch.Tensor | None]


def qwen2_biases(value: float) -> Tensors:
    sizes = {"q": 64, "k": 32, "v": 32}
    return {
        f"model.layers.{layer}.self_attn.{name}_proj.bias": torch.full((size,), value)
        for layer in range(3)
        for name, size in sizes.items()
    }


@pytest.fixture(scope="session")
def states() -> dict[str, Tensors]:
    """The weights of each family's tiny model."""
    llama = dict(iter_weights(resolve("random:tiny-llama")))
    qwen3 = dict(iter_weights(resolve("random:tiny-qwen3")))
    return {
        "llama": llama,
        "qwen2": llama | qwen2_biases(0.1),
        "qwen3": qwen3,
        "mistral": llama,
    }


@pytest.fixture
def make(tmp_path: Path, states: dict[str, Tensors]) -> Callable[..., Path]:
    """Makes a family's folder with changes to its config and its tensors; None takes one away."""

    def make_folder(family: str, config: dict[str, Any], tensors: Tensors) -> Path:
        folder = tmp_path / "model"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(CONFIGS[family] | config))
        changed = states[family] | tensors
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make_folder


def load_with_transformers(folder: Path) -> None:
    """What the engines of parts 01 and 02 do."""
    model = load_transformers_model(resolve(str(folder)), torch.float32)
    context_length(model.config)


def loader_of(part: int) -> Callable[..., Any]:
    """What makes a part's runner: from part 09 on, with its ranks."""
    module = module_of(part, "model_runner")
    return getattr(module, "load_runner", module.ModelRunner)


def load_with_part(part: int) -> Callable[[Path], Any]:
    config_class = module_of(part, "config").EngineConfig
    load = loader_of(part)
    return lambda folder: load(
        config_class(model=str(folder), num_blocks=4, threads=1), resolve(str(folder))
    )


def draft_with(part: int) -> Callable[[Path], Any]:
    """The folder as the model that drafts."""
    config = module_of(part, "config").EngineConfig
    load = loader_of(part)
    options = {"speculative": "draft", "num_blocks": 4, "threads": 1}
    return lambda folder: load(
        config(model="random:tiny-llama", draft_model=str(folder), **options),
        resolve("random:tiny-llama"),
    )


OWN_LOADERS = {f"part{part:02d}": load_with_part(part) for part in OWN_PARTS}
LOADERS = {"transformers": load_with_transformers, **OWN_LOADERS}
# In the short form of the parts with a model of their own the first, the first with experts, the latest.
SHORT_LOADERS = {"transformers", "part03", "part11", f"part{OWN_PARTS[-1]:02d}"}


def short_form(loaders: dict[str, Any]) -> list[Any]:
    return [
        pytest.param(name, marks=[] if name in SHORT_LOADERS else pytest.mark.long)
        for name in loaders
    ]


def check_refused(load: Callable[[Path], Any], folder: Path, words: list[str]) -> None:
    with pytest.raises(ModelError) as raised:
        load(folder)
    message = str(raised.value)
    assert "\n" not in message and len(message) < 500, message
    for word in words:
        assert word in message, f"{word!r} is not in {message!r}"


@pytest.mark.parametrize("loader", short_form(LOADERS))
@pytest.mark.parametrize("family", CONFIGS)
def test_good_folders_load(make: Callable[..., Path], loader: str, family: str) -> None:
    """The control for all that is refused below."""
    LOADERS[loader](make(family, {}, {}))


@pytest.mark.parametrize("loader", short_form(LOADERS))
def test_good_options_load(make: Callable[..., Path], loader: str) -> None:
    """Values at the edge of what is refused below."""
    config = {
        "sliding_window": 1,
        "rope_parameters": LLAMA3_ROPE,
        "max_position_embeddings": MAX_CONTEXT,
        "rms_norm_eps": 1e-12,
        "quantization_config": None,
    }
    LOADERS[loader](make("mistral", config, {}))


def rope(**changes: Any) -> dict[str, Any]:
    base = {"rope_type": "default", "rope_theta": 10000.0}
    return {"rope_parameters": base | changes}


def llama3(**changes: Any) -> dict[str, Any]:
    return {"rope_parameters": LLAMA3_ROPE | changes}


NAN, INFINITY = float("nan"), float("inf")

# Of each: the family, what is changed in its config, and what the message must say.
WRONG_CONFIGS: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama", {"num_key_value_heads": 3}, ["num_key_value_heads 3", "divides", "4"]),
    ("llama", {"num_key_value_heads": 1}, ["k_proj.weight", "as [32, 64], not [16, 64]"]),
    ("llama", {"num_key_value_heads": 0}, ["num_key_value_heads 0", "from 1"]),
    ("llama", {"num_key_value_heads": -2}, ["num_key_value_heads -2", "from 1"]),
    ("llama", {"num_key_value_heads": True}, ["num_key_value_heads True", "whole number"]),
    ("llama", {"num_key_value_heads": 2.0}, ["num_key_value_heads 2.0", "whole number"]),
    ("llama", {"num_key_value_heads": "2"}, ["num_key_value_heads"]),
    ("llama", {"num_attention_heads": 0}, ["num_attention_heads 0", "from 1"]),
    ("llama", {"num_attention_heads": 8}, ["q_proj.weight", "as [64, 64], not [128, 64]"]),
    ("llama", {"head_dim": 8}, ["q_proj.weight", "as [64, 64], not [32, 64]"]),
    ("llama", {"head_dim": 3}, ["head_dim", "3", "even"]),
    ("llama", {"head_dim": 15}, ["head_dim", "15", "even"]),
    ("llama", {"head_dim": 0}, ["head_dim 0", "from 1"]),
    ("llama", {"head_dim": 10**6}, ["head_dim 1000000", "to 512"]),
    ("llama", {"hidden_size": 32}, ["as [512, 64], not [512, 32]"]),
    ("llama", {"intermediate_size": 100}, ["gate_proj.weight", "as [160, 64], not [100, 64]"]),
    ("llama", {"vocab_size": 2**40}, ["not [1099511627776, 64]"]),
    ("llama", {"vocab_size": 2**62}, ["vocab_size 4611686018427387904", "from 1"]),
    ("llama", {"vocab_size": 513}, ["embed_tokens.weight", "as [512, 64], not [513, 64]"]),
    ("llama", {"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000", "from 1"]),
    ("qwen3", {"num_hidden_layers": 10**9}, ["num_hidden_layers 1000000000", "from 1"]),
    ("llama", {"text_config": {"num_hidden_layers": 10**9}}, ["num_hidden_layers 1000000000"]),
    ("llama", {"num_hidden_layers": 4}, ["lacks"]),
    ("llama", {"num_labels": 10**9}, ["num_labels 1000000000", "from 1"]),
    ("llama", {"attribute_map": {"hidden_size": "vocab_size"}}, ["attribute_map"]),
    ("llama", {"hidden_size": "64"}, ["hidden_size", "'64'", "int"]),
    ("llama", {"max_position_embeddings": 10**12}, ["max_position_embeddings is 1000000000000"]),
    ("llama", {"max_position_embeddings": MAX_CONTEXT + 1}, [f"at most {MAX_CONTEXT} tokens"]),
    ("llama", {"max_position_embeddings": 1}, ["max_position_embeddings"]),
    ("llama", rope(rope_theta=0), ["rope_theta 0", "from 1"]),
    ("llama", rope(rope_theta=-10000.0), ["rope_theta -10000.0", "from 1"]),
    ("llama", rope(rope_theta=NAN), ["rope_theta nan", "from 1"]),
    ("llama", rope(rope_theta=INFINITY), ["rope_theta inf", "from 1"]),
    ("llama", rope(rope_theta=10**400), ["rope_theta 1000", "from 1"]),
    ("llama", rope(rope_theta="10000"), ["rope_theta"]),
    ("llama", rope(rope_theta=None), ["rope_theta"]),
    ("llama", llama3(factor=0), ["factor"]),
    ("llama", llama3(factor=-8.0), ["factor"]),
    ("llama", llama3(factor=NAN), ["factor"]),
    ("llama", llama3(factor="8"), ["factor"]),
    ("llama", llama3(low_freq_factor=4.0), ["high_freq_factor 4.0", "low_freq_factor, 4.0"]),
    ("llama", llama3(high_freq_factor=NAN), ["high_freq_factor"]),
    ("llama", llama3(original_max_position_embeddings=0), ["original_max_position_embeddings"]),
    ("llama", llama3(original_max_position_embeddings="x"), ["validate_rope"]),
    ("llama", {"rms_norm_eps": 0.0}, ["rms_norm_eps 0.0", "between 0 and 1"]),
    ("llama", {"rms_norm_eps": -1e-5}, ["rms_norm_eps -1e-05", "between 0 and 1"]),
    ("llama", {"rms_norm_eps": NAN}, ["rms_norm_eps nan", "between 0 and 1"]),
    ("llama", {"rms_norm_eps": 1e9}, ["rms_norm_eps 1000000000.0", "between 0 and 1"]),
    ("llama", {"rms_norm_eps": "x"}, ["rms_norm_eps"]),
    ("mistral", {"sliding_window": 0}, ["sliding_window 0", "from 1"]),
    ("mistral", {"sliding_window": -4}, ["sliding_window -4", "from 1"]),
    ("mistral", {"sliding_window": 2**70}, ["sliding_window 11805", "from 1"]),
    ("mistral", {"sliding_window": "x"}, ["sliding_window"]),
    ("qwen3", {"layer_types": ["full_attention"]}, ["layer_types"]),
    ("qwen3", {"layer_types": ["no_attention"] * 3}, ["layer_types"]),
    ("llama", {"quantization_config": {"quant_method": "gptq"}}, ["quantization_config"]),
]

# The same for tensors.
WRONG_TENSORS: list[tuple[str, Tensors, list[str]]] = [
    ("llama", {"model.norm.weight": torch.ones(1)}, ["model.norm.weight", "as [1], not [64]"]),
    (
        "llama",
        {"model.layers.2.input_layernorm.weight": torch.ones(64, 1)},
        ["model.layers.2.input_layernorm.weight", "as [64, 1], not [64]"],
    ),
    (
        "llama",
        {"model.layers.0.post_attention_layernorm.weight": torch.ones(128)},
        ["model.layers.0.post_attention_layernorm.weight", "as [128], not [64]"],
    ),
    ("llama", {"lm_head.weight": torch.ones(500, 64)}, ["lm_head", "as [500, 64], not [512, 64]"]),
    ("llama", {"lm_head.weight": None}, ["lacks", "lm_head.weight"]),
    ("llama", {f"{ATTENTION}.o_proj.weight": None}, ["lacks", f"{ATTENTION}.o_proj.weight"]),
    (
        "llama",
        {"model.layers.1.mlp.down_proj.weight": torch.ones(160, 64)},
        ["model.layers.1.mlp.down_proj.weight", "as [160, 64], not [64, 160]"],
    ),
    (
        "llama",
        {f"{ATTENTION}.q_proj.weight": torch.ones(96, 64)},
        [f"{ATTENTION}.q_proj.weight", "as [96, 64], not [64, 64]"],
    ),
    (
        "llama",
        {"model.norm.weight": torch.ones(64, dtype=torch.int8)},
        ["model.norm.weight", "as I8, not floating-point"],
    ),
    (
        "llama",
        {f"{ATTENTION}.v_proj.weight": torch.ones(32, 64).to(torch.float8_e4m3fn)},
        [f"{ATTENTION}.v_proj.weight", "F8_E4M3"],
    ),
    ("qwen3", {f"{ATTENTION}.q_norm.weight": torch.ones(1)}, ["q_norm", "as [1], not [32]"]),
    ("qwen3", {f"{ATTENTION}.k_norm.weight": torch.ones(64)}, ["k_norm", "as [64], not [32]"]),
    ("qwen3", {f"{ATTENTION}.q_norm.weight": None}, ["lacks", f"{ATTENTION}.q_norm.weight"]),
    (
        "qwen3",
        {f"{ATTENTION}.q_norm.weight": None, f"{ATTENTION}.k_norm.weight": None},
        ["lacks", "_norm.weight"],
    ),
    ("qwen2", {f"{ATTENTION}.k_proj.bias": torch.ones(1)}, ["k_proj.bias", "as [1], not [32]"]),
    ("qwen2", {f"{ATTENTION}.q_proj.bias": None}, ["lacks", f"{ATTENTION}.q_proj.bias"]),
    ("qwen2", dict.fromkeys(qwen2_biases(0)), ["lacks", "_proj.bias"]),
]

# What only our loader refuses: models that transformers knows.
UNSUPPORTED: list[tuple[str, dict[str, Any], Tensors, list[str]]] = [
    ("llama", rope(partial_rotary_factor=0.5), {}, ["partial_rotary_factor is 0.5"]),
    ("llama", rope(rope_type="linear", factor=2.0), {}, ["rope_type is 'linear'"]),
    ("qwen3", {"layer_types": ["linear_attention"] * 3}, {}, ["layer_types is 'linear_attention'"]),
]


def names(value: Any) -> str | None:
    return ",".join(value)[:60] if isinstance(value, dict) else None


@pytest.mark.parametrize("loader", short_form(LOADERS))
@pytest.mark.parametrize(("family", "config", "words"), WRONG_CONFIGS, ids=names)
def test_wrong_configs(
    make: Callable[..., Path], loader: str, family: str, config: dict[str, Any], words: list[str]
) -> None:
    check_refused(LOADERS[loader], make(family, config, {}), words)


@pytest.mark.parametrize("loader", short_form(LOADERS))
@pytest.mark.parametrize(("family", "tensors", "words"), WRONG_TENSORS, ids=names)
def test_wrong_tensors(
    make: Callable[..., Path], loader: str, family: str, tensors: Tensors, words: list[str]
) -> None:
    check_refused(LOADERS[loader], make(family, {}, tensors), words)


@pytest.mark.parametrize("loader", short_form(OWN_LOADERS))
@pytest.mark.parametrize(("family", "config", "tensors", "words"), UNSUPPORTED, ids=names)
def test_models_that_are_not_supported(
    make: Callable[..., Path],
    loader: str,
    family: str,
    config: dict[str, Any],
    tensors: Tensors,
    words: list[str],
) -> None:
    check_refused(OWN_LOADERS[loader], make(family, config, tensors), words)


@pytest.mark.parametrize(
    ("family", "config", "tensors", "words"),
    [
        ("qwen3", {}, {f"{ATTENTION}.q_norm.weight": torch.ones(1)}, ["q_norm", "as [1]"]),
        ("llama", {}, {"model.norm.weight": torch.ones(64, dtype=torch.int8)}, ["as I8"]),
        ("llama", rope(rope_theta=NAN), {}, ["rope_theta nan"]),
        ("llama", {"num_hidden_layers": 10**9}, {}, ["num_hidden_layers 1000000000"]),
    ],
    ids=names,
)
def test_draft_models(
    make: Callable[..., Path],
    family: str,
    config: dict[str, Any],
    tensors: Tensors,
    words: list[str],
) -> None:
    check_refused(draft_with(PARTS[-1]), make(family, config, tensors), words)


def test_a_lower_limit_makes_a_long_context_usable(make: Callable[..., Path]) -> None:
    config = load_config(resolve(str(make("llama", {"max_position_embeddings": 10**12}, {}))))
    assert context_length(config, 1000) == 1000
    with pytest.raises(ValueError, match=f"max_model_len is {MAX_CONTEXT + 1}"):
        context_length(config, MAX_CONTEXT + 1)


def test_weights_are_not_made_up_for_others(make: Callable[..., Path]) -> None:
    """The mark of `random:<preset>` in another folder: the weights are the file's all the same."""
    folder = make("llama", {}, {"model.norm.weight": torch.full((64,), 7.0)})
    (folder / "random_weights.json").write_text('{"preset": "tiny-llama", "seed": 0}')
    weights = dict(iter_weights(resolve(str(folder))))
    assert torch.equal(weights["model.norm.weight"], torch.full((64,), 7.0))


@pytest.mark.parametrize("model", ["tiny-llama", "tiny-qwen3-moe"])
def test_shapes_of_random_weights_are_kept_until_they_may_be_others(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers is asked once; again when the file is damaged, of another version or config."""
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(tmp_path))
    asked = []
    ask = checkpoint.empty_model
    monkeypatch.setattr(checkpoint, "empty_model", lambda config: asked.append(1) or ask(config))
    folder = resolve(f"random:{model}")
    first = dict(iter_weights(folder))
    kept = (folder / "shapes.json").read_text()
    for number, text in enumerate(
        ("{", "[]", "{}", kept.replace('"made_of": [', '"made_of": [7, '))
    ):
        for _ in range(2):
            again = dict(iter_weights(folder))
            assert list(again) == list(first) and len(asked) == 1 + number
            assert all(torch.equal(again[name], first[name]) for name in first)
        (folder / "shapes.json").write_text(text)
    assert [file.name for file in folder.glob(".*")] == []


ALL_STARTS = [(part, optimize) for part in (1, *OWN_PARTS) for optimize in ([], ["-O"])]
# In the short form without -O, under which Python first compiles all of torch and transformers anew: one
# test of test_model_files.py does, and shows that refusals are no asserts.
SHORT = [(1, []), (OWN_PARTS[-1], [])]


@pytest.mark.parametrize(
    ("part", "optimize"),
    [pytest.param(*s, marks=[] if s in SHORT else pytest.mark.long) for s in ALL_STARTS],
    ids=str,
)
def test_servers_end_with_one_line(
    make: Callable[..., Path], part: int, optimize: list[str], tokenizer_json: str
) -> None:
    """What loading refuses, in-process tests show for every model; this is how a server says it."""
    folder = make("qwen3", {}, {f"{ATTENTION}.q_norm.weight": torch.ones(1)})
    (folder / "tokenizer.json").write_text(tokenizer_json)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    server = [sys.executable, *optimize, "-m", f"part{part:02d}.server"]
    result = subprocess.run(
        [*server, "--port", "0", "--model", str(folder)], capture_output=True, text=True
    )
    assert result.returncode == 1, result
    assert "as [1], not [32]" in result.stderr
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr


@pytest.mark.parametrize("shape", [(10**12, 0, 1), (10**12, 1, 0), (1 << 17, 1, 1)])
def test_fused_experts_of_a_shape_that_no_layer_has(shape: tuple[int, ...]) -> None:
    """One without bytes can say any number: it would be a name for each of 10^12 experts."""
    name = "model.layers.0.mlp.experts.down_proj"
    with pytest.raises(ModelError, match=rf"{name} is \[{shape[0]}, "):
        split_experts({name: Header(Path("x.safetensors"), "F32", shape)})
