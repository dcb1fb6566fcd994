"""Calibration: the algorithms against textbook forms, scaling that changes nothing, the folder written."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.kernels.quantized import QuantizedWeight
from common.models.architecture import ModelConfig
from common.models.checkpoint import load_config
from common.models.errors import ModelError
from common.models.quantized_writer import QuantizedWriter
from common.models.weight_slices import open_weights
from common.texts import CALIBRATION, EVALUATION, sections
from part14_quantization import calibrate, scaling
from part14_quantization.calibrate import (
    PRODUCTS,
    Plan,
    calibrated,
    layer_tensors,
    main,
    scale_layer,
)
from part14_quantization.gptq import fit_scales, gptq, output_error, round_to
from part14_quantization.observe import TextInLayers
from part14_quantization.quantization import quantize_int4
from part14_quantization.scaling import Inputs, awq_scales, smooth_scales

LIMITS = (-8, 7)
TINY = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": None,
}  # fmt: skip
MODELS = {
    "llama": lambda: transformers.LlamaConfig(**TINY),
    "qwen2, biases": lambda: transformers.Qwen2Config(**TINY),
    "qwen3, tied": lambda: transformers.Qwen3Config(
        **TINY, head_dim=32, tie_word_embeddings=True, attention_bias=True
    ),
}


def skewed_inputs(features: int, tokens: int = 200, seed: int = 0) -> torch.Tensor:
    """Correlated, and some channels much larger than others: as a model's are."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator)
    sizes = torch.randn(features, generator=generator).mul(1.5).exp()
    return torch.randn(tokens, features, generator=generator) @ mixing * sizes


def seen(x: torch.Tensor) -> Inputs:
    inputs = Inputs.of(x.shape[1])
    for piece in x.split(64):
        inputs.add(piece)
    return inputs


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """Writes a dense model with random weights: norms and biases, too."""

    def write(kind: str) -> Path:
        torch.manual_seed(0)
        network = transformers.AutoModelForCausalLM.from_config(MODELS[kind]())
        for name, parameter in network.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                torch.nn.init.normal_(parameter, 1.0, 0.3)
        folder = tmp_path / "plain"
        network.save_pretrained(folder)
        return folder

    return write


def textbook_gptq(
    weight: torch.Tensor, hessian: torch.Tensor, scales: torch.Tensor, group: int, damping: float
) -> torch.Tensor:
    """One column after another, the inverse of what is left by elimination, in float64."""
    hessian, rest = hessian.double(), weight.double().clone()
    order = hessian.diagonal().argsort(descending=True).tolist()
    left = hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()
    inverse = torch.linalg.inv(left)
    codes = torch.zeros_like(rest)
    for column in order:
        scale = scales[:, column // group].double()
        codes[:, column] = (rest[:, column] / scale).round().clamp(*LIMITS)
        error = (rest[:, column] - codes[:, column] * scale) / inverse[column, column]
        rest -= torch.outer(error, inverse[column])
        inverse -= torch.outer(inverse[:, column], inverse[column]) / inverse[column, column]
        inverse[column], inverse[:, column] = 0, 0
        inverse[column, column] = 1  # never used again
    return codes.float()


@pytest.mark.parametrize("seed", range(3))
def test_gptq_is_the_textbooks_and_better_than_rounding(seed: int) -> None:
    x, weight = skewed_inputs(96, seed=seed), normal(24, 96, seed=seed)
    hessian = x.T @ x
    scales = quantize_int4(weight).scales.float()
    wide = scales.repeat_interleave(32, dim=1)
    codes = gptq(weight, hessian, scales, 32, LIMITS, damping=0.01, block=40)
    slow = textbook_gptq(weight, hessian, scales, 32, 0.01)
    plain = round_to(weight, wide, LIMITS)

    def error(chosen: torch.Tensor) -> float:
        return output_error(chosen * wide - weight, hessian)

    assert (codes == slow).float().mean() > 0.99  # float32 may round another way at a border
    assert error(codes) == pytest.approx(error(slow), rel=0.05)
    assert error(codes) < 0.5 * error(plain)
    # The error is that of the outputs.
    outputs = x @ (plain * wide - weight).T
    assert error(plain) == pytest.approx(outputs.square().sum().item(), rel=1e-3)
    # Without correlations there is nothing to make good: GPTQ is plain rounding.
    assert torch.equal(gptq(weight, torch.eye(96), scales, 32, LIMITS), plain)


def test_gptq_leaves_inputs_alone_that_are_never_there() -> None:
    x = skewed_inputs(64)
    x[:, 7] = 0
    weight = normal(8, 64)
    scales = quantize_int4(weight).scales.float()
    codes = gptq(weight, x.T @ x, scales, 32, LIMITS)
    assert codes.isfinite().all() and codes.abs().max() <= 8
    plain = round_to(weight, scales.repeat_interleave(32, dim=1), LIMITS)
    assert torch.equal(codes[:, 7], plain[:, 7])


def test_fitted_scales_lose_less_than_those_of_the_largest() -> None:
    weight, importance = normal(16, 64), skewed_inputs(64).square().sum(0)
    fitted = fit_scales(weight, importance, 32, LIMITS)
    assert torch.equal(fitted, fitted.half().float())  # as a file keeps them

    def loss(scales: torch.Tensor) -> torch.Tensor:
        wide = scales.repeat_interleave(32, dim=1)
        lost = (round_to(weight, wide, LIMITS) * wide - weight).square() * importance
        return lost.unflatten(1, (-1, 32)).sum(2)

    largest = weight.unflatten(1, (-1, 32)).abs().amax(2)
    assert (loss(fitted) <= loss((largest / 8).half().float()) * (1 + 1e-5)).all()
    assert loss(fitted).sum() < 0.9 * loss((largest / 7.5).half().float()).sum()
    zeros = fit_scales(torch.zeros(2, 64), importance, 32, LIMITS)
    assert torch.equal(
        round_to(torch.zeros(2, 64), zeros.repeat_interleave(32, 1), LIMITS), torch.zeros(2, 64)
    )


def test_awq_chooses_scales_that_lose_less() -> None:
    x, weight = skewed_inputs(96), normal(24, 96)
    inputs = seen(x)
    assert torch.allclose(inputs.hessian, x.T @ x, rtol=1e-4, atol=1e-2)
    assert torch.allclose(inputs.mean, x.abs().mean(0), rtol=1e-4)
    assert torch.equal(inputs.largest, x.abs().amax(0)) and inputs.num_tokens == len(x)

    def rounded(weight: torch.Tensor) -> torch.Tensor:
        return quantize_int4(weight).dequantize()

    scales = awq_scales(weight, inputs, rounded)
    after = output_error(rounded(weight * scales) / scales - weight, inputs.hessian)
    assert after < output_error(rounded(weight) - weight, inputs.hessian)
    divided = seen(x / scales)
    assert torch.allclose(inputs.divided(scales).hessian, divided.hessian, rtol=1e-3, atol=1e-2)
    assert torch.allclose(inputs.divided(scales).largest, divided.largest, rtol=1e-4)


def test_smoothing_halves_the_exponents() -> None:
    x, weight = skewed_inputs(32), normal(8, 32)
    scales = smooth_scales(weight, seen(x))
    # With an exponent of 0.5 the largest input and the largest weight of a channel become equal.
    assert torch.allclose((x / scales).abs().amax(0), (weight * scales).abs().amax(0), rtol=1e-4)


def forward(folder: Path, number: int, change: Callable[[Any, Any, Any], None]) -> torch.Tensor:
    """What a layer computes after its tensors were changed."""
    config = load_config(folder)
    shape = ModelConfig.from_transformers(config, 128)
    source = open_weights(folder)
    embedding = source.read("model.embed_tokens.weight", (300, 64))
    token_ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(2))
    text = TextInLayers(shape, token_ids, embedding)
    tensors = layer_tensors(source, number)
    change(tensors, text.observe(number, tensors), shape)
    text.advance(number, tensors)
    return torch.cat([*text.added, *text.residuals])


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["awq", "smoothquant"])
def test_scaling_changes_no_output(
    model: Callable[..., Path], kind: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model(kind)
    before = forward(folder, 0, lambda *_: None)
    changed: dict[str, int] = {}

    def scale(tensors: Any, inputs: Any, shape: Any) -> None:
        old = dict(tensors)
        scale_layer(tensors, inputs, Plan("int4", method), shape)
        changed.update({name: 1 for name in old if not torch.equal(old[name], tensors[name])})

    after = forward(folder, 0, scale)
    assert torch.allclose(before, after, rtol=1e-3, atol=1e-3 * before.abs().max().item())
    assert "input_layernorm.weight" in changed and "mlp.gate_proj.weight" in changed
    if method == "awq":
        assert {"self_attn.o_proj.weight", "mlp.down_proj.weight"} <= changed.keys()
    # A control: the weights scaled, what makes their inputs not.
    broken = tuple((names, "no_such_norm") for names, _ in PRODUCTS)
    monkeypatch.setattr(calibrate, "PRODUCTS", broken)
    wrong = forward(folder, 0, scale)
    assert not torch.allclose(before, wrong, rtol=1e-2, atol=1e-2 * before.abs().max().item())


@pytest.mark.parametrize(("format", "method"), [("int4", "awq+gptq"), ("int8", "smoothquant+gptq")])
def test_a_folder_that_others_read(
    model: Callable[..., Path], tmp_path: Path, format: str, method: str
) -> None:
    folder, out = model("qwen3, tied"), tmp_path / "out"
    token_ids = torch.randint(300, (9, 24), generator=torch.Generator().manual_seed(3))
    expected: dict[str, torch.Tensor] = {}
    with QuantizedWriter(folder, out) as writer:
        for name, tensor in calibrated(folder, token_ids, Plan(format, method)):
            writer.write(name, tensor)
            is_quantized = isinstance(tensor, QuantizedWeight)
            assert is_quantized == name.endswith("_proj.weight"), name
            expected[name] = tensor.dequantize() if is_quantized else tensor
    source = open_weights(out, quantized=True)  # as the engine reads it
    for name, tensor in expected.items():
        ours = source.quantized(name, tuple(tensor.shape)) if tensor.dim() == 2 else None
        assert (ours is not None) == name.endswith("_proj.weight")
        if ours is not None:
            assert torch.equal(ours.dequantize(), tensor), name
            assert ours.activations == ("int8" if format == "int8" else None)
        else:
            assert torch.equal(source.read(name, tuple(tensor.shape)), tensor)
    with pytest.raises(ModelError, match="is quantised"):
        next(calibrated(out, token_ids, Plan(format, method)))
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert decompressed(out, config).keys() == expected.keys()
    for name, tensor in decompressed(out, config).items():
        assert torch.allclose(tensor.float(), expected[name], rtol=1e-3, atol=1e-6), name


def decompressed(folder: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """A folder's weights by the layout's own library."""
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    parsed = QuantizationConfig.model_validate(config)
    [scheme] = parsed.config_groups.values()
    codec = library.BaseCompressor.load_from_registry(config["format"])
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    found = {}
    for layer in {name.rpartition(".")[0] for name in tensors}:
        own = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.rpartition(".")[0] == layer}
        if "weight_scale" in own:
            scale = own["weight_scale"].float()
            own = codec.decompress({**own, "weight_scale": scale}, scheme)
            own = {"weight": own["weight"], **({"bias": own["bias"]} if "bias" in own else {})}
        found |= {f"{layer}.{name}": tensor for name, tensor in own.items()}
    return found


def test_the_rounded_layer_feeds_the_next(model: Callable[..., Path]) -> None:
    """INT4 with calibration is nearer to the model than INT4 without, by transformers."""
    folder = model("llama")
    token_ids = torch.randint(300, (16, 32), generator=torch.Generator().manual_seed(4))
    other_ids = torch.randint(300, (4, 32), generator=torch.Generator().manual_seed(5))
    network = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    @torch.inference_mode()
    def logits() -> torch.Tensor:
        return network(other_ids).logits

    exact, errors = logits(), {}
    for method in ("round", "gptq"):
        for name, tensor in calibrated(folder, token_ids, Plan("int4", method)):
            if isinstance(tensor, QuantizedWeight):
                network.get_parameter(name).data.copy_(tensor.dequantize())
        errors[method] = (logits() - exact).square().mean().item()
    assert 0 < errors["gptq"] < 0.7 * errors["round"]


@pytest.mark.parametrize("method", ["round", "awq", "gptq"])
def test_weights_that_are_too_large(model: Callable[..., Path], method: str) -> None:
    folder = model("llama")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1e7
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    message = r"format is int4: model\.layers\.1\.mlp\.gate_proj: weights up to .* beyond float"
    with pytest.raises(ValueError, match=message):
        list(calibrated(folder, torch.ones(1, 8, dtype=torch.int64), Plan("int4", method)))


def test_inputs_that_are_too_large() -> None:
    with pytest.raises(ValueError, match=r"X\^T X is not finite"):
        Plan("int4", "gptq").round(normal(8, 32), seen(torch.full((4, 32), 1e30)))
    with pytest.raises(ValueError, match="H without an inverse"):
        gptq(normal(8, 32), -torch.eye(32), torch.ones(8, 1), 32, LIMITS)


def test_a_text_that_the_model_cannot_take(model: Callable[..., Path]) -> None:
    folder, plan = model("llama"), Plan("int4", "round")
    with pytest.raises(ValueError, match="length is 129: the model's context is 128"):
        next(calibrated(folder, torch.zeros(1, 129, dtype=torch.int64), plan))
    with pytest.raises(ValueError, match="the text has the token 300: the model knows 300 of them"):
        next(calibrated(folder, torch.full((1, 8), 300), plan))


def test_two_runs_into_one_folder(model: Callable[..., Path], tmp_path: Path) -> None:
    """The second is told, and the first one's result stays. Nothing is there before it is whole."""
    folder, out = model("llama"), tmp_path / "out"
    first, second = QuantizedWriter(folder, out), QuantizedWriter(folder, out)
    with pytest.raises(ModelError, match="out: Directory not empty"), second:
        with first:
            for writer, value in ((first, 1.0), (second, 2.0)):
                writer.write("x.weight", quantize_int4(torch.full((8, 32), value)))
            assert not out.exists()
        files = {path.name: path.read_bytes() for path in out.iterdir()}
    assert files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"config.json", "model.safetensors"} <= files.keys()
    with pytest.raises(KeyboardInterrupt), QuantizedWriter(folder, tmp_path / "third") as writer:
        writer.write("x.weight", torch.ones(3))
        raise KeyboardInterrupt
    assert {path.name for path in tmp_path.iterdir()} == {"plain", "out"}


def test_text_sections(tmp_path: Path) -> None:
    calibration, evaluation = sections(CALIBRATION), sections(EVALUATION)
    assert {"wells", "readme", "code", "sums"} <= calibration.keys() & evaluation.keys()
    # Nothing is measured on what was calibrated on.
    known = {line for text in calibration.values() for line in text.splitlines() if len(line) > 40}
    sums = set(calibration["sums"].splitlines())
    lines = {line for text in evaluation.values() for line in text.splitlines()}
    assert len(lines & known) <= 3, sorted(lines & known)  # imports, as all code has
    assert not sums & set(evaluation["sums"].splitlines())
    plain = tmp_path / "own.txt"
    plain.write_text("one\ntwo\n")
    assert sections(plain) == {"own": "one\ntwo\n"}


ERRORS = {
    "a folder that is not empty": ({}, "full is not empty"),
    "a file in its place": ({"output": "file"}, "file is no folder"),
    "no text": ({"text": "nothing.txt"}, "nothing.txt: No such file"),
    "an empty text": ({"text": "empty.txt"}, "there is no text in it"),
    "a random model": ({"model": "random:tiny-llama", "output": "new"}, "has no tokenizer"),
    "tokens": ({"tokens": "0"}, "tokens is 0: at least 1"),
    "threads": ({"threads": "1025"}, "threads is 1025: at most 1024"),
    "an unknown model": ({"model": "no such"}, "model 'no such' is no folder"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "kept").write_text("kept")
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.txt").write_text("\n=== a\n\n")
    changes, expected = ERRORS[case]
    values = {"model": "smollm2-135m", "output": "full", **changes}
    if "text" in changes:
        values["output"] = "new"
    flags = [part for name, value in values.items() for part in (f"--{name}", value)]
    assert main(flags) == 2
    captured = capsys.readouterr()
    [line] = [line for line in captured.err.splitlines() if "error" in line]
    assert expected in line and captured.out == ""
    assert (tmp_path / "full" / "kept").read_text() == "kept"
    assert not (tmp_path / "new").exists()


def test_flags_are_checked_by_the_parser(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--format", "int3", "--output", "new"])
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1 and "int3" in told


def test_a_mixture_is_refused() -> None:
    from common.models.checkpoint import resolve

    token_ids = torch.zeros(1, 8, dtype=torch.int64)
    with pytest.raises(ModelError, match="has experts"):
        next(calibrated(resolve("random:tiny-mixtral"), token_ids, Plan("int4", "gptq")))


def test_shared_scales() -> None:
    values = torch.arange(12.0)  # 2 KV heads, 3 query heads to each, head_dim 2
    shared = scaling.share(values, (2, 3, 2)).view(2, 3, 2)
    assert torch.equal(shared[0, 0], shared[0, 2]) and torch.equal(
        shared[1, 0], torch.tensor([8.0, 9.0])
    )
