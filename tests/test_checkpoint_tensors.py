"""What is true of a model: the checkpoint over its config, as transformers has it, in every part.

The oracle is `AutoModelForCausalLM.from_pretrained` on the folder itself, without our code. Parts 01
and 02 load through `load_transformers_model`, parts from 03 on through `iter_weights` and their own
model: each must have the oracle's logits over the same tokens, or refuse the folder where the oracle
fails or makes weights up.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.kernels import AttentionMetadata
from common.kernels.reference import ReferenceOps
from common.models.checkpoint import (
    context_length,
    iter_weights,
    load_config,
    load_transformers_model,
    resolve,
    weight_files,
)
from common.models.errors import ModelError
from common.models.weight_slices import open_weights
from common.testing.parts import distinct_files, module_of

OWN_PARTS = distinct_files("model.py")
TOKENS = [5, 77, 130, 9, 4, 44, 45, 2, 9, 100]
BLOCK_SIZE = 4
HIDDEN, VOCAB, LAYERS = 32, 131, 2
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LAYER = "model.layers.0.self_attn"
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"

State = dict[str, torch.Tensor]

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": BASE | {"model_type": "llama"},
    "qwen2": BASE | {"model_type": "qwen2"},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 16},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": 6},
}


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, State]:
    """Weights of each family with a head of their own, all of them exact in half precision."""
    import transformers

    torch.manual_seed(0)
    found = {}
    for family, values in CONFIGS.items():
        config = transformers.AutoConfig.for_model(**values)
        model = transformers.AutoModelForCausalLM.from_config(config)
        found[family] = {
            name: (torch.randn(tensor.shape) * 0.2 + name.endswith("norm.weight")).half().float()
            for name, tensor in model.state_dict().items()
        }
    return found


@pytest.fixture
def new_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    return lambda: tmp_path_factory.mktemp("model")


def write(folder: Path, family: str, state: State, **config: Any) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIGS[family] | config))
    save(folder / WHOLE, state)
    return folder


def save(path: Path, state: State) -> None:
    save_file({name: tensor.clone() for name, tensor in state.items()}, path, {"format": "pt"})


def write_index(folder: Path, *names: str) -> None:
    weight_map = {f"{i}": name for i, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def by_transformers(folder: Path) -> Any:
    """The model as transformers loads the folder, or None where it fails or makes weights up."""
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except Exception:
        return None
    finally:
        transformers.logging.set_verbosity(verbosity)
    return None if info["missing_keys"] else model.eval()


def own_model(part: int, folder: Path) -> Any:
    config = load_config(folder)
    module = module_of(part, "model")
    shape = module.ModelConfig.from_transformers(config, context_length(config))
    where = torch.float32, torch.device("cpu")
    weights = iter_weights(folder) if part < 9 else open_weights(folder)
    return module.CausalLM(shape, ReferenceOps(), weights, *where)


@torch.inference_mode()
def reference_logits(model: Any) -> torch.Tensor:
    return model(torch.tensor([TOKENS])).logits[0]


@torch.inference_mode()
def own_logits(part: int, model: Any) -> torch.Tensor:
    """One forward over the tokens, as one sequence."""
    count = len(TOKENS)
    num_blocks = -(-count // BLOCK_SIZE)
    cache = module_of(part, "kv_cache").KVCache(
        num_blocks, BLOCK_SIZE, model.config, torch.float32, torch.device("cpu")
    )
    metadata = AttentionMetadata(
        cu_seqlens_q=torch.tensor([0, count], dtype=torch.int32),
        seq_lens=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(num_blocks, dtype=torch.int32)[None],
        slot_mapping=torch.arange(count),
        max_query_len=count,
        max_seq_len=count,
    )
    hidden = model.forward(torch.tensor(TOKENS), torch.arange(count), cache.data, metadata)
    return model.logits(hidden)


def check_same(folder: Path) -> Any:
    """Every part has transformers' logits on this folder, or refuses it with one line.

    Returns transformers' model, None where it is refused.
    """
    right = by_transformers(folder)
    loaders: dict[str, Callable[[Path], torch.Tensor]] = {
        "transformers": lambda path: reference_logits(load_transformers_model(path, torch.float32))
    }
    for part in OWN_PARTS:
        loaders[f"part{part:02d}"] = lambda path, part=part: own_logits(part, own_model(part, path))
    for name, load in loaders.items():
        try:
            logits = load(resolve(str(folder)))
        except ModelError as error:
            assert right is None, f"{name} refuses what transformers loads: {error}"
            assert "\n" not in str(error) and len(str(error)) < 500
            continue
        assert right is not None, f"{name} loads what transformers does not"
        expected = reference_logits(right)
        assert torch.equal(logits.argmax(-1), expected.argmax(-1)), name
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4, msg=name)
    return right


# The head.

HEADS: dict[str, Callable[[State], State]] = {
    "other": lambda state: state,
    "equal": lambda state: state | {HEAD: state[EMBEDDING]},
    "equal in half": lambda state: state | {HEAD: state[EMBEDDING].half()},
    "none": lambda state: {name: tensor for name, tensor in state.items() if name != HEAD},
    "only": lambda state: {name: tensor for name, tensor in state.items() if name != EMBEDDING},
    "neither": lambda state: {
        name: tensor for name, tensor in state.items() if name not in (HEAD, EMBEDDING)
    },
    "one row other": lambda state: state | {HEAD: changed(state[EMBEDDING], VOCAB - 1)},
    "short": lambda state: state | {HEAD: state[EMBEDDING][:-1]},
    "flat": lambda state: state | {HEAD: state[EMBEDDING].flatten()},
}
REFUSED = {True: ("neither", "short", "flat"), False: ("none", "only", "neither", "short", "flat")}


def changed(tensor: torch.Tensor, row: int) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[row] += 5
    return tensor


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_heads(
    new_folder: Callable[[], Path], states: dict[str, State], family: str, tied: bool, head: str
) -> None:
    folder = write(new_folder(), family, HEADS[head](states[family]), tie_word_embeddings=tied)
    right = check_same(folder)
    assert (right is None) == (head in REFUSED[tied])


def test_heads_differ(new_folder: Callable[[], Path], states: dict[str, State]) -> None:
    """The control for the above: with the embedding as its head the model says other things."""
    states = {head: HEADS[head](states["llama"]) for head in ("other", "none")}
    folders = [write(new_folder(), "llama", s, tie_word_embeddings=True) for s in states.values()]
    own, tied = (reference_logits(by_transformers(folder)).argmax(-1) for folder in folders)
    assert (own != tied).float().mean() > 0.5


@pytest.mark.parametrize("part", OWN_PARTS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", ["other", "equal", "equal in half"])
def test_equal_heads_are_there_once(
    new_folder: Callable[[], Path], states: dict[str, State], part: int, tied: bool, head: str
) -> None:
    state = states["llama"]
    folder = write(new_folder(), "llama", HEADS[head](state), tie_word_embeddings=tied)
    model = own_model(part, folder)
    is_shared = tied and head != "other"
    assert (model.lm_head is model.embedding) == is_shared
    counted = sum(tensor.numel() for name, tensor in state.items() if name != HEAD or not is_shared)
    assert model.num_bytes == 4 * counted
    loaded = load_transformers_model(folder, torch.float32)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == is_shared


@pytest.mark.parametrize(
    ("head", "is_equal", "pieces"),
    [
        ("equal in half", True, 17),
        ("other", False, 1),
        ("one row other", False, 17),
        ("equal", True, 0),
        ("equal but for its zeros", True, 17),
    ],
)
def test_comparing_heads_takes_pieces(
    new_folder: Callable[[], Path],
    states: dict[str, State],
    monkeypatch: pytest.MonkeyPatch,
    head: str,
    is_equal: bool,
    pieces: int,
) -> None:
    """Of 4,192 numbers no more than 256 are converted at a time, and none after one that differs."""
    from common.models import weights

    sizes = []
    equal = torch.equal

    def count(first: torch.Tensor, second: torch.Tensor) -> bool:
        if first.is_floating_point():
            sizes.append(first.numel())
        return equal(first, second)

    state = states["llama"] | {EMBEDDING: states["llama"][EMBEDDING].clone()}
    state[EMBEDDING][7] = 0.0
    if head == "equal but for its zeros":
        state[HEAD] = state[EMBEDDING].clone()
        state[HEAD][7] = -0.0
    else:
        state = HEADS[head](state)
    folder = write(new_folder(), "llama", state, tie_word_embeddings=True)
    monkeypatch.setattr(weights, "PIECE", 256)
    monkeypatch.setattr(torch, "equal", count)
    assert (HEAD not in dict(iter_weights(folder))) == is_equal
    assert len(sizes) == pieces and all(size <= 256 for size in sizes)
    monkeypatch.undo()
    check_same(folder)


# Names, and tensors without a place.


def renamed(state: State, kind: str) -> State:
    """The state under other names: without the prefix, with it twice, or some of each."""
    if kind == "bare":
        return {name.removeprefix("model."): tensor for name, tensor in state.items()}
    if kind == "twice":
        return {f"model.{name}": tensor for name, tensor in state.items()}
    if kind == "mixed":
        return {
            name.removeprefix("model.") if i % 2 else name: tensor
            for i, (name, tensor) in enumerate(state.items())
        }
    if kind == "both":  # two tensors for one weight: one of them counts
        others = {name.removeprefix("model."): tensor + 0.3 for name, tensor in state.items()}
        return others | state
    if kind == "inner":  # as within a model of images and text
        return {f"language_model.{name}": tensor for name, tensor in state.items()}
    return state


NAMES = ["as they are", "bare", "twice", "mixed", "both", "inner"]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_names(
    new_folder: Callable[[], Path], states: dict[str, State], family: str, tied: bool, names: str
) -> None:
    state = renamed(states[family], names)
    folder = write(new_folder(), family, state, tie_word_embeddings=tied)
    assert (check_same(folder) is None) == (names == "inner")


EXTRAS: State = {
    f"{LAYER}.rotary_emb.inv_freq": torch.ones(4),
    f"{LAYER}.rotary_emb.cos_cached": torch.ones(1, 1, 64, 8),
    "layers.1.self_attn.rotary_emb.sin_cached": torch.ones(1, 1, 64, 8).half(),
    "model.rotary_emb.inv_freq": torch.ones(4, dtype=torch.float64),
    f"{LAYER}.masked_bias": torch.tensor(-1e4),
    f"{LAYER}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
    "model.position_ids": torch.arange(8),
    "position_ids": torch.arange(8)[None],
    f"{LAYER}.o_proj.bias": torch.ones(HIDDEN),
    "model.layers.0.mlp.gate_proj.bias": torch.ones(48),
    "model.layers.7.self_attn.q_proj.weight": torch.ones(HIDDEN, HIDDEN),
    "model.embed_tokens.bias": torch.ones(VOCAB),
    "model.norm.bias": torch.ones(HIDDEN),
    "lm_head.bias": torch.ones(VOCAB),
    "score.weight": torch.ones(2, HIDDEN),
    f"{LAYER}.q_proj.weight_scale": torch.ones(1).to(torch.float8_e4m3fn),
    f"{LAYER}.q_proj.qweight": torch.ones(8, 8, dtype=torch.int32),
}


@pytest.mark.parametrize("extra", EXTRAS)
def test_tensors_without_a_place(
    new_folder: Callable[[], Path],
    states: dict[str, State],
    extra: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All load; and every part names what it leaves out, unless it is a rotary table."""
    folder = write(new_folder(), "llama", states["llama"] | {extra: EXTRAS[extra]})
    assert check_same(folder) is not None
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    if "rotary_emb" in extra:
        assert lines == []
    else:
        assert len(lines) == 1 + len(OWN_PARTS) and len(set(lines)) == 1, lines
        assert "warning: 1 of" in lines[0] and repr(extra) in lines[0]


def test_a_warning_names_a_few_and_is_one_line(
    new_folder: Callable[[], Path], states: dict[str, State], capsys: pytest.CaptureFixture[str]
) -> None:
    """However many there are, and whatever their names do to a terminal."""
    names = ["a\x1b[31m\nb", "a" * 10_000, *(f"c{i}" for i in range(50))]
    extras = {name: torch.ones(1) for name in names}
    check_same(write(new_folder(), "llama", states["llama"] | extras))
    lines = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert len(lines) == 1 + len(OWN_PARTS) and len(set(lines)) == 1
    assert "warning: 52 of" in lines[0] and "and 49 more" in lines[0] and "\x1b" not in lines[0]
    assert len(lines[0]) < 500


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", CONFIGS)
def test_base_models(new_folder: Callable[[], Path], family: str, tied: bool) -> None:
    """Saved by transformers without a head: whole where the embedding is the head."""
    import transformers

    config = transformers.AutoConfig.for_model(**CONFIGS[family], tie_word_embeddings=tied)
    config.initializer_range = 0.2
    folder = new_folder()
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    assert (check_same(folder) is not None) == tied


# Config against tensors, beyond the head: what transformers says.


@pytest.mark.parametrize(
    ("family", "config", "loads"),
    [
        ("llama", {"num_hidden_layers": 1}, True),  # the file's second layer is left out
        ("llama", {"num_hidden_layers": 3}, False),
        ("llama", {"attention_bias": True}, False),  # the file has none
        ("llama", {"mlp_bias": True}, False),
        ("qwen3", {"attention_bias": True}, False),
        ("mistral", {"attention_bias": True}, True),  # the family knows no such thing
        ("qwen2", {"attention_bias": False}, True),  # and this one always has them
        ("llama", {"vocab_size": VOCAB + 1}, False),
        ("llama", {"vocab_size": VOCAB - 1}, False),
        ("llama", {"head_dim": 16}, False),
        ("qwen3", {"head_dim": 8}, False),
        ("qwen3", {"model_type": "llama", "head_dim": 16}, True),  # without its head norms
        ("llama", {"model_type": "qwen3", "head_dim": 8}, False),  # which are missing here
        ("llama", {"model_type": "qwen2"}, False),
        ("qwen2", {"model_type": "llama"}, True),  # without its biases
        ("llama", {"dtype": "float16"}, True),
        ("llama", {"dtype": "bfloat16", "torch_dtype": "float64"}, True),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, True),
    ],
    ids=str,
)
def test_config_and_tensors_disagree(
    new_folder: Callable[[], Path],
    states: dict[str, State],
    family: str,
    config: dict[str, Any],
    loads: bool,
) -> None:
    folder = write(new_folder(), family, states[family], **config)
    assert (check_same(folder) is not None) == loads


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats(
    new_folder: Callable[[], Path], states: dict[str, State], dtype: torch.dtype
) -> None:
    """Of the file, some or all; the config says float32."""
    state = states["qwen3"]
    for kept in (set(), {EMBEDDING}, set(list(state)[::2])):
        mixed = {name: t if name in kept else t.to(dtype) for name, t in state.items()}
        assert check_same(write(new_folder(), "qwen3", mixed, dtype="float32")) is not None


# Which files.


def split(state: State) -> tuple[State, State]:
    names = list(state)
    return tuple({name: state[name] for name in names[i::2]} for i in range(2))


def other(state: State) -> State:
    return {name: tensor + 0.3 for name, tensor in state.items()}


def whole(folder: Path, state: State) -> None:
    save(folder / WHOLE, state)


def sharded(folder: Path, state: State) -> None:
    first, second = split(state)
    save(folder / "a.safetensors", first)
    save(folder / "b.safetensors", second)
    write_index(folder, "b.safetensors", "a.safetensors")


def one_shard(folder: Path, state: State) -> None:
    save(folder / "only.safetensors", state)
    write_index(folder, "only.safetensors")


def overlapping(folder: Path, state: State) -> None:
    """The first file has all names, the second other values for some."""
    save(folder / "a.safetensors", state)
    save(folder / "b.safetensors", other(split(state)[0]))
    write_index(folder, "b.safetensors", "a.safetensors")


def stray_shard(folder: Path, state: State) -> None:
    """A shard that the index does not name is not read."""
    sharded(folder, state)
    save(folder / "c.safetensors", other(state))


def both(folder: Path, state: State) -> None:
    sharded(folder, other(state))
    save(folder / WHOLE, state)


def stale(folder: Path, state: State) -> None:
    save(folder / WHOLE, state)
    write_index(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def broken_index(folder: Path, state: State) -> None:
    save(folder / WHOLE, state)
    (folder / INDEX).write_text("{")


def missing_shard(folder: Path, state: State) -> None:
    sharded(folder, state)
    (folder / "b.safetensors").unlink()


def missing_half(folder: Path, state: State) -> None:
    save(folder / "a.safetensors", split(state)[0])
    write_index(folder, "a.safetensors")


def a_folder_named_so(folder: Path, state: State) -> None:
    sharded(folder, state)
    (folder / WHOLE).mkdir()


def variant(folder: Path, state: State) -> None:
    save(folder / "model.fp16.safetensors", state)


def named(folder: Path, state: State) -> None:
    """The config says which file, whatever else there is."""
    save(folder / "mine.safetensors", state)
    both(folder, other(state))
    add_to_config(folder, transformers_weights="mine.safetensors")


def named_index(folder: Path, state: State) -> None:
    one_shard(folder, state)
    (folder / INDEX).rename(folder / "mine.safetensors.index.json")
    save(folder / WHOLE, other(state))
    add_to_config(folder, transformers_weights="mine.safetensors.index.json")


def named_pickle(folder: Path, state: State) -> None:
    whole(folder, state)
    (folder / "mine.bin").write_bytes(b"")
    add_to_config(folder, transformers_weights="mine.bin")


def named_nothing(folder: Path, state: State) -> None:
    whole(folder, state)
    add_to_config(folder, transformers_weights="gone.safetensors")


def add_to_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


LAYOUTS: dict[Callable[[Path, State], None], bool] = {  # and whether it loads
    whole: True,
    sharded: True,
    one_shard: True,
    overlapping: True,
    stray_shard: True,
    both: True,
    stale: True,
    broken_index: True,
    a_folder_named_so: True,
    named: True,
    named_index: True,
    missing_shard: False,
    missing_half: False,
    variant: False,
    named_pickle: False,
    named_nothing: False,
}


def lay_out(
    folder: Path, family: str, state: State, layout: Callable[[Path, State], None], **config: Any
) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIGS[family] | config))
    layout(folder, state)
    return folder


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("tied", [True, False])
def test_layouts(
    new_folder: Callable[[], Path],
    states: dict[str, State],
    layout: Callable[[Path, State], None],
    tied: bool,
) -> None:
    state = HEADS["none" if tied else "other"](states["llama"])
    folder = lay_out(new_folder(), "llama", state, layout, tie_word_embeddings=tied)
    assert (check_same(folder) is not None) == LAYOUTS[layout]


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/../x.safetensors",
        "\0.safetensors",
        "fifo",
        "link.safetensors",
        "../x.safetensors.index.json",
        "x.bin",
        "",
        5,
        ["model.safetensors"],
    ],
    ids=repr,
)
def test_files_that_the_config_names_stay_in_the_folder(
    new_folder: Callable[[], Path], states: dict[str, State], name: Any
) -> None:
    folder = write(new_folder(), "llama", states["llama"])
    for outside in ("x.safetensors", "x.safetensors.index.json"):
        save(folder.parent / outside, states["llama"])
    (folder / "link.safetensors").symlink_to(folder.parent / "x.safetensors")
    if name == "fifo":
        name = "fifo.safetensors"
        os.mkfifo(folder / name)
    add_to_config(folder, transformers_weights=name)
    for action in (lambda: resolve(str(folder)), lambda: weight_files(folder)):
        with pytest.raises(ModelError) as raised:
            action()
        assert "\n" not in str(raised.value)


def test_links_to_themselves(new_folder: Callable[[], Path], states: dict[str, State]) -> None:
    folder = write(new_folder(), "llama", states["llama"])
    (folder / WHOLE).unlink()
    (folder / WHOLE).symlink_to(folder / WHOLE)
    with pytest.raises(ModelError):
        weight_files(folder)


# Memory.


def mapped_ranges(folder: Path) -> list[range]:
    """The addresses at which files of a folder are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    inside = [line for line in lines if str(folder) in line]
    assert inside, "no file of the folder is mapped"
    spans = [line.split()[0].split("-") for line in inside]
    return [range(int(first, 16), int(last, 16)) for first, last in spans]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc/self/maps")
@pytest.mark.parametrize("layout", [whole, sharded, overlapping], ids=lambda f: f.__name__)
@pytest.mark.parametrize("names", ["as they are", "bare"])
def test_weights_are_views_of_the_files(
    new_folder: Callable[[], Path],
    states: dict[str, State],
    layout: Callable[[Path, State], None],
    names: str,
) -> None:
    """On the CPU, in the files' own dtype: parts 01 and 02 run them where they are mapped."""
    state = renamed(HEADS["equal"](states["llama"]), names)
    folder = lay_out(new_folder(), "llama", state, layout, tie_word_embeddings=layout is whole)
    model = load_transformers_model(folder, torch.float32)
    ranges = mapped_ranges(folder)
    for name, parameter in model.named_parameters():
        assert any(parameter.data_ptr() in span for span in ranges), name
    converted = load_transformers_model(folder, torch.float64)
    assert not any(converted.lm_head.weight.data_ptr() in span for span in ranges)


# All at once.

FOLDERS = st.fixed_dictionaries(
    {
        "family": st.sampled_from(sorted(CONFIGS)),
        "tied": st.booleans(),
        "head": st.sampled_from(sorted(HEADS)),
        "names": st.sampled_from(NAMES),
        "layout": st.sampled_from(list(LAYOUTS)),
        "extras": st.lists(st.sampled_from(sorted(EXTRAS)), max_size=3, unique=True),
        "missing": st.lists(st.integers(0, 20), max_size=1),
    }
)


@settings(max_examples=60)
@given(plan=FOLDERS)
def test_folders_of_every_kind(
    plan: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, states: dict[str, State]
) -> None:
    """Any of the above together: loaded alike by all parts and transformers, or refused by all."""
    state = renamed(HEADS[plan["head"]](states[plan["family"]]), plan["names"])
    for i in plan["missing"]:
        del state[sorted(state)[i % len(state)]]
    state = state | {name: EXTRAS[name] for name in plan["extras"]}
    folder = tmp_path_factory.mktemp("plan")
    lay_out(folder, plan["family"], state, plan["layout"], tie_word_embeddings=plan["tied"])
    check_same(folder)
