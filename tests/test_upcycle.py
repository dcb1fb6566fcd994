"""A mixture of experts from a dense model: it says the same, by transformers and by part 11."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.models import upcycle as upcycling
from common.models.__main__ import main
from common.models.checkpoint import iter_weights, load_config, load_transformers_model, resolve
from common.models.errors import ModelError
from common.models.upcycle import Mixture, upcycle
from common.models.weight_writer import HEADER_BYTES, LONGEST_ENTRY, WeightWriter
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy
from common.testing.parts import PARTS, make_engine

PROMPTS = [[5], [7, 8, 9], list(range(2, 60)), [40] * 25]
GREEDY = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
SMALL = Mixture(experts=4, top_k=2)
ENGINE = {"num_blocks": 64}
TINY = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip
DENSE = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "llama, tied, scaled": lambda: transformers.LlamaConfig(
        **TINY, tie_word_embeddings=True, rope_parameters=LLAMA3, rms_norm_eps=1e-3
    ),
    "mistral, window": lambda: transformers.MistralConfig(**TINY, sliding_window=8, head_dim=16),
    "qwen3": lambda: transformers.Qwen3Config(
        **TINY, head_dim=16, attention_bias=True, tie_word_embeddings=True
    ),
}


@pytest.fixture
def dense(tmp_path: Path, tokenizer_json: str) -> Callable[..., Path]:
    """Writes a dense model with a tokenizer."""

    def write(kind: str, **changes: Any) -> Path:
        torch.manual_seed(0)
        config = DENSE[kind]()
        for name, value in changes.items():
            setattr(config, name, value)
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.2)
        folder = tmp_path / "dense"
        model.save_pretrained(folder)
        (folder / "tokenizer.json").write_text(tokenizer_json)
        (folder / "chat_template.jinja").write_text("{{ messages }}")
        (folder / "generation_config.json").write_text('{"temperature": 0.5}')
        return folder

    return write


def tokens_of(part: int, folder: Path) -> list[list[int]]:
    engine = make_engine(part, str(folder), **ENGINE)
    outputs = engine.generate(PROMPTS, GREEDY, progress=False)
    engine.shutdown()
    return [done.token_ids for done in outputs]


@pytest.mark.parametrize("kind", DENSE)
def test_it_says_what_the_dense_model_says(
    kind: str, dense: Callable[..., Path], tmp_path: Path
) -> None:
    source, out = dense(kind), tmp_path / "mixture"
    upcycle(str(source), out, SMALL)
    theirs, ours = (load_transformers_model(folder, torch.float32) for folder in (source, out))
    assert type(ours).__name__ in ("MixtralForCausalLM", "Qwen3MoeForCausalLM")
    token_ids = torch.randint(2, 300, (3, 70), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(
            ours(token_ids).logits, theirs(token_ids).logits, atol=1e-4, rtol=0
        )
    outputs = tokens_of(PARTS[-1], out)
    assert outputs == tokens_of(PARTS[-1], source)
    pairs = list(zip(PROMPTS, outputs, strict=True))
    assert check_greedy(str(source), pairs).is_right
    assert not check_greedy(str(source), pairs[1:], "shift").is_right


def test_what_lies_in_the_folder(dense: Callable[..., Path], tmp_path: Path) -> None:
    source, out, told = dense("llama"), tmp_path / "mixture", []
    upcycle(str(source), out, SMALL, shard_bytes=60_000, progress=lambda *own: told.append(own))
    files = {file.name for file in out.iterdir()}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    others = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert files - set(shards) == others | {"tokenizer.json", "chat_template.jinja"}
    assert shards[0] == f"model-00001-of-{len(shards):05d}.safetensors" and len(shards) > 3
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = {}
    for shard in shards:
        own = load_file(out / shard)
        sizes = [tensor.nbytes for tensor in own.values()]
        assert len(sizes) == 1 or sum(sizes) <= 60_000
        assert all(index["weight_map"][name] == shard for name in own)
        tensors |= own
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert told[-1] == (len(tensors), len(tensors))
    assert [done for done, _ in told] == list(range(1, len(tensors) + 1))
    assert load_config(out).num_local_experts == 4
    # Loads differ: with seeds and layers.
    gates = [tensors[f"model.layers.{i}.block_sparse_moe.gate.weight"] for i in range(2)]
    assert not torch.equal(*gates)
    assert [file for file in tmp_path.iterdir() if file.name.startswith(".")] == []


def test_random_weights_too(tmp_path: Path) -> None:
    upcycle("random:tiny-qwen3", tmp_path / "out", SMALL)
    found = dict(iter_weights(tmp_path / "out"))
    for name, tensor in iter_weights(resolve("random:tiny-qwen3")):
        prefix, is_mlp, rest = name.partition(".mlp.")
        if is_mlp:
            copies = [found.pop(f"{prefix}.mlp.experts.{i}.{rest}") for i in range(4)]
            assert all(torch.equal(copy, tensor) for copy in copies)
        else:
            assert torch.equal(found.pop(name), tensor)
    assert all(name.endswith("mlp.gate.weight") for name in found) and len(found) == 3


def test_noise_comes_in_pairs(tmp_path: Path) -> None:
    """The mean of a pair is the dense weight; pairs, seeds and experts of a pair differ."""
    mixture = Mixture(experts=4, top_k=2, noise=0.25, seed=3)
    for name, own in (("a", mixture), ("b", mixture), ("c", replace(mixture, seed=4))):
        upcycle("random:tiny-llama", tmp_path / name, own)
    a, b, c = (dict(iter_weights(tmp_path / name)) for name in "abc")
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    for name, tensor in iter_weights(resolve("random:tiny-llama")):
        prefix, is_mlp, rest = name.partition(".mlp.")
        if not is_mlp:
            continue
        names = [f"{prefix}.mlp.experts.{i}.{rest}" for i in range(4)]
        experts = [a[name] for name in names]
        torch.testing.assert_close(experts[0] + experts[1], 2 * tensor)
        torch.testing.assert_close(experts[2] + experts[3], 2 * tensor)
        for expert in experts:
            ratio = (expert - tensor).std() / tensor.std()
            assert 0.23 < ratio < 0.27
        assert not torch.equal(experts[0], experts[2])
        assert not torch.equal(experts[0], c[names[0]])
    gate = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(a[gate], c[gate])


def test_another_format(tmp_path: Path) -> None:
    upcycle("random:tiny-llama", tmp_path / "out", replace(SMALL, dtype=torch.bfloat16))
    assert load_config(tmp_path / "out").dtype == torch.bfloat16
    for name, tensor in iter_weights(tmp_path / "out"):
        assert tensor.dtype == torch.bfloat16, name


@pytest.mark.parametrize(
    "kind, changes, message",
    [
        ("llama", {"attention_bias": True}, "attention_bias is set in"),
        ("llama", {"mlp_bias": True}, "mlp_bias is set in"),
        (
            "qwen3",
            {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 8},
            "use_sliding_window is set in",
        ),
    ],
)
def test_what_a_mixture_has_not(
    kind: str, changes: dict[str, Any], message: str, dense: Callable[..., Path], tmp_path: Path
) -> None:
    source = dense(kind, **changes)
    with pytest.raises(ModelError, match=message):
        upcycle(str(source), tmp_path / "out", SMALL)


def run(*arguments: str) -> str:
    """The one line that a wrong command ends with."""
    with pytest.raises(ModelError) as caught:
        main(["upcycle", *arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_wrong_commands(tmp_path: Path) -> None:
    out, tiny = str(tmp_path / "out"), "random:tiny-llama"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("text")
    assert f"{tmp_path / 'full'} exists" in run(tiny, str(tmp_path / "full"))
    assert f"{tmp_path / 'full/file'} exists" in run(tiny, str(tmp_path / "full/file"))
    assert "cannot write" in run(tiny, str(tmp_path / "full/file/out"))
    assert "no such preset" in run("random:none", out)
    assert "model_type is 'mixtral'; can be upcycled: llama" in run("random:tiny-mixtral", out)
    assert "top_k is 9: a number from 1 to experts, 8" in run(tiny, out, "--top-k", "9")
    assert "top_k is 0" in run(tiny, out, "--top-k", "0")
    assert "experts is 3: with noise" in run(tiny, out, "--experts", "3", "--noise", "0.1")
    for noise in ("-1", "nan", "2"):
        assert f"noise is {float(noise)}" in run(tiny, out, "--noise", noise)
    assert "seed is -1" in run(tiny, out, "--seed", "-1")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["full"]


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "new/out"
    main(["upcycle", "random:tiny-llama", "--experts", "3", "--top-k", "1", str(out)])
    printed = capsys.readouterr()
    assert printed.out == f"{out}\n" and "100%" in printed.err
    config = load_config(out)
    assert (config.num_local_experts, config.num_experts_per_tok) == (3, 1)
    main(["random:tiny-llama"])
    assert capsys.readouterr().out == f"{resolve('random:tiny-llama')}\n"


@pytest.mark.parametrize("fault", ["interrupt", "no space", "missing weight", "other shape"])
def test_nothing_is_left_of_a_failure(
    fault: str, dense: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = dense("llama"), tmp_path / "results" / "out"
    real = upcycling.iter_weights

    def wrong(folder: Path) -> Any:
        for i, (name, tensor) in enumerate(real(folder)):
            if i == 8 and fault == "interrupt":
                raise KeyboardInterrupt
            if "1.mlp.up_proj" in name and fault == "missing weight":
                continue
            is_other = "1.mlp.up_proj" in name and fault == "other shape"
            yield name, tensor[1:] if is_other else tensor

    monkeypatch.setattr(upcycling, "iter_weights", wrong)
    if fault == "no space":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    kind = KeyboardInterrupt if fault == "interrupt" else ModelError
    message: dict[str, str | None] = {
        "interrupt": None,
        "no space": "needs 0.0 GB in",
        "missing weight": "lacks 4 weights",
        "other shape": r"experts\.0\.w3\.weight as \[79, 48\], not \(80, 48\)",
    }
    with pytest.raises(kind, match=message[fault]):
        upcycle(str(source), out, SMALL)
    assert list(out.parent.iterdir()) == []


def test_weights_that_no_model_has_are_told_and_left_out(
    dense: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    source = dense("llama, tied, scaled")
    file = source / "model.safetensors"
    tensors = load_file(file)
    own_head = torch.randn_like(tensors["model.embed_tokens.weight"])  # against the config's word
    save_file(tensors | {"other": torch.zeros(3), "lm_head.weight": own_head}, file)
    upcycle(str(source), tmp_path / "out", SMALL)
    assert "1 of the checkpoint's tensors are not in its model" in capsys.readouterr().err
    found = dict(iter_weights(tmp_path / "out"))
    assert "other" not in found and torch.equal(found["lm_head.weight"], own_head)


class TestWriter:
    """Files of safetensors, written tensor by tensor."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_one_file(self, tmp_path: Path, dtype: torch.dtype) -> None:
        tensors = {"a": torch.randn(3, 5).to(dtype), "b": torch.randn(0, 4).to(dtype)}
        tensors["c"] = torch.randn(8, 6).to(dtype).T  # not contiguous
        with WeightWriter(tmp_path, 1 << 20) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)
        assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]
        found = load_file(tmp_path / "model.safetensors")
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found[name].dtype == dtype and torch.equal(found[name], tensor)
        with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
            assert file.metadata() == {"format": "pt"}

    def test_more_tensors_than_a_header_has_room_for(self, tmp_path: Path) -> None:
        count = HEADER_BYTES // LONGEST_ENTRY + 5
        with WeightWriter(tmp_path, 1 << 30) as writer:
            for i in range(count):
                writer.write(f"{'x' * 300}.{i}", torch.tensor([float(i)]))
        files = sorted(tmp_path.glob("*.safetensors"))
        assert len(files) == 2
        found = {name: x for file in files for name, x in load_file(file).items()}
        assert [found[f"{'x' * 300}.{i}"].item() for i in range(count)] == list(range(count))


@pytest.mark.long
def test_smollm2_says_what_it_said(tmp_path: Path) -> None:
    """Real text: tokens of the mixture, against the dense model by transformers and by part 11."""
    out = tmp_path / "mixture"
    main(["upcycle", "smollm2-135m", "--experts", "4", "--top-k", "2", str(out)])
    params = SamplingParams(temperature=0.0, max_tokens=60)
    prompts = ["The capital of France is", "def fibonacci(n):", "Once upon a time"]
    texts, pairs = [], []
    for model in ("smollm2-135m", str(out)):
        engine = make_engine(PARTS[-1], model)
        outputs = engine.generate(prompts, params, progress=False)
        texts.append([done.token_ids for done in outputs])
        tokens = [engine.tokenizer.encode(prompt) for prompt in prompts]
        pairs = list(zip(tokens, texts[-1], strict=True))
        engine.shutdown()
        del engine
    assert texts[0] == texts[1]
    assert check_greedy("smollm2-135m", pairs).is_right
