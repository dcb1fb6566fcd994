"""Quantised checkpoints as they are published, and as a stranger may make them.

Tiny ones are packed here, by hand to the published layouts or by compressed-tensors and gguf
themselves, and what is read must be what an independent dequantisation has. Then each is harmed: the
answer is a ModelError of one line, or weights that are numbers.
"""

import copy
import json
import os
import re
import shutil
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from common.kernels.quantized import QuantizedWeight
from common.models import embedded, quantized_cache, quantized_config
from common.models import gguf_model as gguf_module
from common.models.checkpoint import load_config, resolve
from common.models.errors import ModelError
from common.models.gguf_header import read_gguf_header
from common.models.gguf_model import gguf_model
from common.models.gguf_weights import check_tensors, gguf_weights
from common.models.made_folders import NUM_LOCKS, lock_of
from common.models.quantized_cache import cached_weights
from common.models.quantized_config import read_quantization
from common.models.quantized_readers import quantized_modules
from common.models.quantized_stored import stored_weights, write_weights
from common.models.weight_files import read_headers
from common.models.weight_slices import Files, WeightSource, open_weights

IN, OUT = 64, 24
MODULE = "model.layers.0.mlp.up_proj"
NAME = f"{MODULE}.weight"
CONFIG = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": IN,
    "intermediate_size": OUT,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
Tensors = dict[str, torch.Tensor]
Made = tuple[dict[str, Any], Tensors, np.ndarray]  # config, tensors of a module, what they mean


def write(folder: Path, quantization: Any, tensors: Tensors, module: str = MODULE) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    named = {f"{module}.{word}": tensor.contiguous() for word, tensor in tensors.items()}
    save_file(named | {"model.norm.weight": torch.ones(IN)}, folder / "model.safetensors")
    return folder


def read(folder: Path, name: str = NAME, shape: tuple[int, int] = (OUT, IN)) -> QuantizedWeight:
    """As `open_weights` does, without transformers' config, which takes most of its time."""
    quantization = read_quantization(folder)
    if quantization is None:
        raise ModelError("config.json has no quantization_config")
    if quantization.method == "gguf":
        readers, _ = stored_weights(folder, read_headers(folder), Files("cpu").read)
    else:
        readers, _ = quantized_modules(read_headers(folder), quantization, Files("cpu").read)
    if name not in readers:
        raise ModelError(f"the checkpoint lacks {name}")
    return readers[name](shape)


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Instead of the user's."""
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def refuse(action: Callable[[], Any], *words: str) -> None:
    with pytest.raises(ModelError) as raised:
        action()
    text = str(raised.value)
    assert "\n" not in text and len(text) < 600, text
    for word in words:
        assert word in text, text


# GPTQ and AWQ, packed here.


def packed(values: np.ndarray, bits: int, axis: int, places: Any = None) -> torch.Tensor:
    """Unsigned codes as int32 words along an axis, the first in the lowest bits."""
    values = np.moveaxis(values.astype(np.uint64), axis, -1)
    per_word = 32 // bits
    values = values.reshape(*values.shape[:-1], -1, per_word)
    values = values[..., places if places is not None else list(range(per_word))]
    shifts = np.arange(per_word, dtype=np.uint64) * bits
    words = (values << shifts).sum(-1).astype(np.uint32).view(np.int32)
    return torch.from_numpy(np.moveaxis(words, -1, axis).copy())


def gptq(
    bits: int = 4,
    group: int = 16,
    layout: str = "gptq",
    act_order: bool = False,
    is_symmetric: bool = False,
    scales: type = np.float16,
) -> Made:
    rng = np.random.default_rng(bits + group)
    size = IN if group == -1 else group
    groups, top = IN // size, 1 << bits
    codes = rng.integers(0, top, (IN, OUT))
    zeros = np.full((groups, OUT), top // 2)
    if not is_symmetric:
        zeros = rng.integers(1, top, (groups, OUT))
    scale = (rng.random((groups, OUT)) * 0.1 + 0.01).astype(scales)
    index = np.arange(IN) // size
    if act_order:
        index = rng.permutation(index)
    tensors = {
        "qweight": packed(codes, bits, 0),
        "qzeros": packed(zeros - (layout == "gptq"), bits, 1),
        "scales": torch.from_numpy(scale),
        "g_idx": torch.from_numpy(index.astype(np.int32)),
    }
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": act_order}
    config |= {"checkpoint_format": layout, "sym": is_symmetric}
    dense = (codes - zeros[index]).astype(np.float32) * scale[index].astype(np.float32)
    return config, tensors, dense.T


def awq(group: int = 16) -> Made:
    rng = np.random.default_rng(group + 1)
    size = IN if group == -1 else group
    codes, zeros = rng.integers(0, 16, (IN, OUT)), rng.integers(0, 16, (IN // size, OUT))
    scale = (rng.random((IN // size, OUT)) * 0.1 + 0.01).astype(np.float16)
    places = [0, 2, 4, 6, 1, 3, 5, 7]  # of AutoAWQ's gemm version
    tensors = {
        "qweight": packed(codes, 4, 1, places),
        "qzeros": packed(zeros, 4, 1, places),
        "scales": torch.from_numpy(scale),
    }
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    index = np.arange(IN) // size
    dense = (codes - zeros[index]).astype(np.float32) * scale[index].astype(np.float32)
    return config | {"zero_point": True}, tensors, dense.T


@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(4, 16), (4, 32), (4, -1), (8, 16), (8, -1)])
def test_gptq(tmp_path: Path, bits: int, group: int, act_order: bool, layout: str) -> None:
    config, tensors, dense = gptq(bits, group, layout, act_order)
    weight = open_weights(write(tmp_path, config, tensors), quantized=True).quantized(
        NAME, (OUT, IN)
    )
    assert weight is not None and np.array_equal(weight.dequantize().numpy(), dense)
    assert weight.kind == ("uint4" if bits == 4 else "int8") and weight.minimums is not None
    assert (weight.order is not None) == (act_order and group != -1)
    assert weight.group == (IN if group == -1 else group)
    if layout == "gptq":  # the control: the other convention is another weight
        other = read(write(tmp_path / "v2", config | {"checkpoint_format": "gptq_v2"}, tensors))
        assert not np.allclose(other.dequantize().numpy(), dense, atol=1e-3)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("scales", [np.float16, np.float32])
def test_symmetric_gptq_has_no_minimums(tmp_path: Path, bits: int, scales: type) -> None:
    config, tensors, dense = gptq(bits, 32, is_symmetric=True, scales=scales)
    weight = read(write(tmp_path, config, tensors))
    assert weight.minimums is None and weight.kind == f"int{bits}"
    assert np.array_equal(weight.dequantize().numpy(), dense)


def test_gptq_without_an_index(tmp_path: Path) -> None:
    config, tensors, dense = gptq()
    del tensors["g_idx"]
    assert np.array_equal(read(write(tmp_path, config, tensors)).dequantize().numpy(), dense)
    refuse(lambda: read(write(tmp_path, config | {"desc_act": True}, tensors)), "g_idx", "desc_act")


def test_modules_of_gptq_may_differ_where_the_config_says_so(tmp_path: Path) -> None:
    config, tensors, dense = gptq(8, 32)
    config |= {"bits": 4, "group_size": 16}
    refuse(lambda: read(write(tmp_path, config, tensors)), "qweight", "4 bits")
    weight = read(write(tmp_path, config | {"dynamic": {"+:.*": {"bits": 8}}}, tensors))
    assert np.array_equal(weight.dequantize().numpy(), dense)


@pytest.mark.parametrize("group", [16, 32, -1])
def test_awq(tmp_path: Path, group: int) -> None:
    config, tensors, dense = awq(group)
    weight = read(write(tmp_path, config, tensors))
    assert np.array_equal(weight.dequantize().numpy(), dense)
    swapped = tensors | {"qweight": tensors["qweight"].flip(1)}
    assert not np.array_equal(read(write(tmp_path, config, swapped)).dequantize().numpy(), dense)


# compressed-tensors, packed by the library.

WEIGHTS: dict[str, dict[str, Any]] = {
    "int4 group": {"num_bits": 4, "strategy": "group", "group_size": 16},
    "int4 group asymmetric": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": 16,
        "symmetric": False,
    },
    "int4 channel": {"num_bits": 4, "strategy": "channel"},
    "int4 channel asymmetric": {"num_bits": 4, "strategy": "channel", "symmetric": False},
    "int8 group": {"num_bits": 8, "strategy": "group", "group_size": 32},
    "int8 group asymmetric": {
        "num_bits": 8,
        "strategy": "group",
        "group_size": 32,
        "symmetric": False,
    },
    "int8 channel": {"num_bits": 8, "strategy": "channel"},
    "fp8 tensor": {"num_bits": 8, "type": "float", "strategy": "tensor"},
    "fp8 channel": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "fp8 block": {
        "num_bits": 8,
        "type": "float",
        "strategy": "block",
        "block_structure": [16, 32],
    },
    "nvfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "tensor_group",
        "group_size": 16,
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": {
        "num_bits": 4,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
    "mxfp8": {
        "num_bits": 8,
        "type": "float",
        "strategy": "group",
        "group_size": 32,
        "scale_dtype": "torch.uint8",
    },
}
INT8_INPUTS = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
FP8_INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
# name: weights, activations, format, what activations become
COMPRESSED: dict[str, tuple[str, dict[str, Any] | None, str, str | None]] = {
    "W4A16": ("int4 group", None, "pack-quantized", None),
    "W4A16 asymmetric": ("int4 group asymmetric", None, "pack-quantized", None),
    "W4A16 channel": ("int4 channel", None, "pack-quantized", None),
    "W4A16 channel asymmetric": ("int4 channel asymmetric", None, "pack-quantized", None),
    "W8A16": ("int8 group", None, "pack-quantized", None),
    "W8A16 asymmetric": ("int8 group asymmetric", None, "pack-quantized", None),
    "W4A8": ("int4 group", INT8_INPUTS, "pack-quantized", "int8"),
    "W8A8": ("int8 channel", INT8_INPUTS, "int-quantized", "int8"),
    "W8A8 naive": ("int8 channel", None, "naive-quantized", None),
    "FP8 tensor": ("fp8 tensor", FP8_INPUTS, "float-quantized", "fp8"),
    "FP8 channel": ("fp8 channel", FP8_INPUTS, "float-quantized", "fp8"),
    "FP8 block": ("fp8 block", FP8_INPUTS, "float-quantized", "fp8"),
    "NVFP4A16": ("nvfp4", None, "nvfp4-pack-quantized", None),
    "MXFP4A16": ("mxfp4", None, "mxfp4-pack-quantized", None),
    "MXFP8A16": ("mxfp8", None, "mxfp8-quantized", None),
}


def scale_shape(weights: dict[str, Any]) -> tuple[int, ...]:
    if weights["strategy"] in ("group", "tensor_group"):
        return OUT, IN // weights["group_size"]
    if weights["strategy"] == "block":
        rows, columns = weights["block_structure"]
        return -(-OUT // rows), IN // columns
    return (1,) if weights["strategy"] == "tensor" else (OUT, 1)


def compressed(name: str) -> Made:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    kind, inputs, layout, _ = COMPRESSED[name]
    weights = WEIGHTS[kind]
    generator = torch.Generator().manual_seed(len(name))
    dense = torch.randn(OUT, IN, generator=generator)
    scale = torch.rand(scale_shape(weights), generator=generator) * 0.3 + 0.2
    scale = scale.bfloat16().float()  # as files have them; products are exact
    state = {"weight": dense}
    if "scale_dtype" in weights:
        scale = torch.exp2(scale.log2().floor()) if kind.startswith("mx") else scale
    if kind == "nvfp4":
        state["weight_global_scale"] = torch.tensor([32.0])  # the library divides in bfloat16
        scale = (scale * 32).to(torch.float8_e4m3fn).float()
    if not weights.get("symmetric", True):
        half = 1 << weights["num_bits"] - 1
        zeros = torch.randint(-half, half, scale.shape, generator=generator)
        state["weight_zero_point"] = zeros.to(torch.int8)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**weights),
        input_activations=None if inputs is None else QuantizationArgs(**inputs),
    )
    compressor = BaseCompressor.get_value_from_registry(layout)
    tensors = compressor.compress(state | {"weight_scale": scale}, scheme)
    back = compressor.decompress(tensors, scheme)["weight"].float().numpy()
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"quant_method": "compressed-tensors", "format": layout, "ignore": ["lm_head"]}
    return config | {"config_groups": {"group_0": group}}, dict(tensors), back


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors(tmp_path: Path, name: str) -> None:
    config, tensors, dense = compressed(name)
    weight = read(write(tmp_path, config, tensors))
    assert weight.activations == COMPRESSED[name][3]
    np.testing.assert_allclose(weight.dequantize().numpy(), dense, rtol=3e-7, atol=3e-7)
    assert np.abs(dense).max() > 0.1 and np.abs(np.roll(dense, 1, 1) - dense).max() > 0.1
    kinds = {"int4 g": "int4", "int8": "int8", "fp8": "fp8_e4m3", "nvfp4": "fp4_e2m1"}
    kinds |= {"mxfp4": "fp4_e2m1", "mxfp8": "fp8_e4m3"}
    kind = COMPRESSED[name][0]
    if "asymmetric" not in kind:
        assert weight.kind == next(found for word, found in kinds.items() if word[:4] in kind)
        assert weight.minimums is None


def test_the_factor_of_nvfp4(tmp_path: Path) -> None:
    config, tensors, dense = compressed("NVFP4A16")
    factor = torch.tensor([37.3])
    weight = read(write(tmp_path, config, tensors | {"weight_global_scale": factor}))
    expected = dense.astype(np.float64) * 32 / 37.3
    np.testing.assert_allclose(weight.dequantize().numpy(), expected, rtol=3e-7)


def test_a_real_config_of_the_library(tmp_path: Path) -> None:
    """As QuantizationConfig writes itself, with all its fields."""
    from compressed_tensors.quantization import QuantizationConfig

    config, tensors, dense = compressed("W4A16 asymmetric")
    del config["quant_method"]
    full = json.loads(QuantizationConfig(**config).model_dump_json())
    full |= {"quant_method": "compressed-tensors", "version": "0.20.0", "sparsity_config": {}}
    weight = read(write(tmp_path, full, tensors))
    np.testing.assert_allclose(weight.dequantize().numpy(), dense, rtol=3e-7, atol=3e-7)


def test_groups_of_modules(tmp_path: Path) -> None:
    """Two schemes: each module follows the one whose targets name it."""
    config, tensors, _ = compressed("W8A8")
    eight = config["config_groups"]["group_0"]
    four, fours, _ = compressed("W4A16")
    group = four["config_groups"]["group_0"] | {"targets": [r"re:.*layers\.\d+\.mlp.*"]}
    config |= {"config_groups": {"a": eight, "b": group}, "format": "mixed-precision"}
    other = "model.layers.0.self_attn.q_proj"
    named = {f"{other}.{word}": tensor for word, tensor in tensors.items()}
    named |= {f"{MODULE}.{word}": tensor for word, tensor in fours.items()}
    folder = write(tmp_path, config, {})
    save_file(named, folder / "model.safetensors")
    assert read(folder).kind == "int4"
    assert read(folder, f"{other}.weight").activations == "int8"


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(.*)*x",
        ".*" * 12 + "x",
        "(a|a)*b",
        "((a|b+)*)+",
        "(?=a)",
        "(",
        "x{",
        "(.|.)" * 25 + "x",
        "(?:.|[)|])" * 20 + r"\)x",
    ],
)
def test_patterns_that_take_long(tmp_path: Path, pattern: str) -> None:
    config, tensors, _ = compressed("W8A8")
    group = config["config_groups"]["group_0"]
    evil = group | {"targets": [f"re:{pattern}"]}
    config["config_groups"] = {"a": evil, "b": group}
    folder = write(tmp_path, config, tensors)
    if pattern == "x{":
        assert read(folder).kind == "int8"  # no repetition: it is text
    else:
        refuse(lambda: read(folder), "target", repr(f"re:{pattern}")[:20])


def test_steps_of_a_pattern() -> None:
    """Ways in which it can match a text of 40 characters: what real patterns take is far below."""
    most, found = quantized_config.MOST_STEPS, quantized_config.most_steps
    assert found("self_attn", 40) == 1 and found(r".*_proj", 40) == 41
    assert found(r".*(q|k|v)_proj", 40) == 41 * 3 and found(r"(a|b)(c|(d|e))", 40) == 2 * 2 * 2
    assert found(r"[|(]\|\(|x", 40) == 2
    layers = "|".join(map(str, range(50)))
    assert (
        found(rf".*layers\.({layers})\.(mlp|self_attn)\..*_proj", 40)
        < most
        < found("(.|.)" * 24, 1)
    )


def test_modules_and_targets_together_take_no_long_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors, _ = compressed("W8A8")
    group = config["config_groups"]["group_0"]
    config["config_groups"] = {"a": group | {"targets": ["re:.*.*x", "y"]}, "b": group}
    monkeypatch.setattr(quantized_config, "MOST_STEPS_IN_ALL", 2500)
    quantization = read_quantization(write(tmp_path, config, tensors))
    assert quantization is not None
    for _ in range(2):
        assert quantized_config.scheme_of("m" * 40, quantization) == quantization.schemes[1]
    refuse(lambda: quantized_config.scheme_of("m" * 40, quantization), "target 're:.*.*x'", "long")


@pytest.mark.parametrize("name", ["W4A16", "W8A8", "FP8 channel"])
def test_zero_points_of_a_symmetric_weight(tmp_path: Path, name: str) -> None:
    config, tensors, dense = compressed(name)
    zeros = torch.zeros(tensors["weight_scale"].shape, dtype=torch.int8)
    weight = read(write(tmp_path, config, tensors | {"weight_zero_point": zeros}))
    np.testing.assert_allclose(weight.dequantize().numpy(), dense, rtol=3e-7, atol=3e-7)
    zeros[3] = 1
    folder = write(tmp_path, config, tensors | {"weight_zero_point": zeros})
    refuse(lambda: read(folder), f"{MODULE}.weight_zero_point", "symmetric true")


def deepseek() -> Made:
    generator = torch.Generator().manual_seed(1)
    codes = torch.randn(OUT, IN, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=generator) + 0.5
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}
    dense = codes.float() * scale.repeat_interleave(16, 0)[:OUT].repeat_interleave(32, 1)
    tensors = {"weight": codes, "weight_scale_inv": scale}
    return config | {"weight_block_size": [16, 32]}, tensors, dense.numpy()


def autofp8() -> Made:
    codes = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(2))
    codes = codes.to(torch.float8_e4m3fn)
    tensors = {"weight": codes, "weight_scale": torch.tensor(0.25), "input_scale": torch.ones(())}
    config = {"quant_method": "fp8", "activation_scheme": "static"}
    return config, tensors, codes.float().numpy() * 0.25


@pytest.mark.parametrize("made", [deepseek, autofp8])
def test_fp8(tmp_path: Path, made: Callable[[], Made]) -> None:
    config, tensors, dense = made()
    source = open_weights(write(tmp_path, config, tensors), quantized=True)
    weight = source.quantized(NAME, (OUT, IN))
    assert weight is not None and weight.activations == "fp8"
    assert np.array_equal(weight.dequantize().numpy(), dense)
    assert source.names == {NAME, "model.norm.weight"}
    assert bool(source.notes) == (made is autofp8)


def test_a_block_of_more_outputs_than_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, tensors, _ = deepseek()
    scale = torch.rand(1, 2) + 0.5
    config, tensors = (
        config | {"weight_block_size": [1 << 20, 32]},
        tensors | {"weight_scale_inv": scale},
    )
    folder, asked, repeat = write(tmp_path, config, tensors), [], torch.Tensor.repeat_interleave

    def noted(self: torch.Tensor, times: int, **others: Any) -> torch.Tensor:
        asked.append(times)
        return repeat(self, times, **others)

    monkeypatch.setattr(torch.Tensor, "repeat_interleave", noted)
    assert torch.equal(read(folder).scales, scale.expand(OUT, 2)) and max(asked) <= OUT


# Names.


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("layers.0.mlp.up_proj", NAME),
        (
            "model.layers.0.block_sparse_moe.experts.1.w3",
            "model.layers.0.mlp.experts.1.up_proj.weight",
        ),
        ("model.layers.0.mlp.experts.1.up_proj", "model.layers.0.mlp.experts.1.up_proj.weight"),
        ("lm_head", "lm_head.weight"),
    ],
)
def test_names(tmp_path: Path, module: str, name: str) -> None:
    config, tensors, dense = gptq()
    folder = write(tmp_path, config, tensors, module)
    assert open_weights(folder, quantized=True).names == {name, "model.norm.weight"}
    assert np.array_equal(read(folder, name).dequantize().numpy(), dense)


def test_plain_modules_stay_plain(tmp_path: Path) -> None:
    config, tensors, _ = gptq()
    folder = write(tmp_path, config | {"modules_to_not_convert": ["q_proj"]}, tensors)
    source = open_weights(folder, quantized=True)
    assert source.quantized("model.norm.weight", (1, IN)) is None
    assert torch.equal(source.read("model.norm.weight", (IN,)), torch.ones(IN))
    refuse(lambda: source.read(NAME, (OUT, IN)), NAME, "quantised")
    refuse(lambda: source.quantized("model.layers.0.x.weight", (OUT, IN)), "lacks")
    refuse(lambda: source.quantized(NAME, (OUT, IN * 2)), "qweight")
    refuse(lambda: source.quantized(NAME, (OUT * 2, IN)), "qweight")


def test_a_weight_twice(tmp_path: Path) -> None:
    config, tensors, _ = gptq()
    folder = write(tmp_path, config, tensors | {"weight": torch.zeros(OUT, IN)})
    refuse(lambda: open_weights(folder, quantized=True), "twice")


@pytest.mark.parametrize("made", [gptq, awq, deepseek])
def test_parts_that_cannot_run_it_say_so(tmp_path: Path, made: Callable[[], Made]) -> None:
    config, tensors, _ = made()
    folder = write(tmp_path, config, tensors)
    for action in (load_config, open_weights):
        refuse(
            lambda action=action: action(resolve(str(folder))), "quantised", "quantization_config"
        )


# Strangers' values.

ALL: dict[str, Callable[[], Made]] = {
    "gptq": lambda: gptq(act_order=True),
    "gptq8": lambda: gptq(8, 32),
    "awq": awq,
    "deepseek": deepseek,
    "autofp8": autofp8,
    **{name: lambda name=name: compressed(name) for name in COMPRESSED},
}
NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def everything() -> dict[str, Made]:
    return {name: made() for name, made in ALL.items()}


def scales_of(tensors: Tensors) -> list[str]:
    return [word for word in tensors if "scale" in word and not word.startswith("input")]


@pytest.mark.parametrize("name", ALL)
def test_scales_that_are_no_numbers(tmp_path: Path, everything: dict[str, Made], name: str) -> None:
    config, tensors, _ = everything[name]
    for word in scales_of(tensors):
        for value in (NAN, INF, -INF, 3e38):
            harmed = tensors[word].clone()
            if harmed.dtype is torch.uint8:
                harmed.flatten()[-1] = 255
            elif harmed.dtype is torch.float8_e4m3fn:
                harmed.view(torch.uint8).flatten()[-1] = 0x7F
            else:
                harmed.flatten()[-1] = value
            folder = write(tmp_path, config, tensors | {word: harmed})
            if word == "weight_global_scale" and value == 3e38:
                continue  # its inverse is a number
            refuse(lambda folder=folder: read(folder), word)


@pytest.mark.parametrize("name", ALL)
def test_zero_and_negative_scales_are_numbers(
    tmp_path: Path, everything: dict[str, Made], name: str
) -> None:
    config, tensors, _ = everything[name]
    for word in scales_of(tensors):
        for value in (0.0, -0.25):
            if tensors[word].dtype is torch.uint8:
                continue
            harmed = tensors | {word: torch.full_like(tensors[word], value)}
            folder = write(tmp_path, config, harmed)
            if word == "weight_global_scale":
                refuse(lambda folder=folder: read(folder), word, "positive")
            else:
                assert read(folder).dequantize().isfinite().all()


@pytest.mark.parametrize("code", [0x7F, 0xFF])
@pytest.mark.parametrize("name", ["deepseek", "autofp8", "FP8 channel", "MXFP8A16"])
def test_codes_that_are_no_numbers(
    tmp_path: Path, everything: dict[str, Made], name: str, code: int
) -> None:
    config, tensors, _ = everything[name]
    codes = tensors["weight"].clone()
    codes.view(torch.uint8)[OUT - 1, IN - 1] = code
    refuse(lambda: read(write(tmp_path, config, tensors | {"weight": codes})), NAME, "E4M3")


@pytest.mark.parametrize(
    ("place", "value", "word"),
    [
        (0, -1, "group -1"),
        (3, 4, "group 4"),
        (5, 2**31 - 1, "group 2147483647"),
        (5, -(2**31), "group -2147483648"),
        (slice(None), 0, "64 inputs in group 0"),
    ],
)
def test_groups_out_of_range(
    tmp_path: Path, everything: dict[str, Made], place: Any, value: int, word: str
) -> None:
    config, tensors, _ = everything["gptq"]
    index = tensors["g_idx"].clone()
    index[place] = value
    refuse(lambda: read(write(tmp_path, config, tensors | {"g_idx": index})), "g_idx", word)


@pytest.mark.parametrize("name", ALL)
def test_missing_and_wrong_tensors(tmp_path: Path, everything: dict[str, Made], name: str) -> None:
    """Each tensor left out, of another type, transposed, longer, shorter, empty, flat, deep."""
    config, tensors, _ = everything[name]
    optional = {"g_idx", "weight_shape", "input_scale"}
    for word, tensor in tensors.items():
        less = {other: kept for other, kept in tensors.items() if other != word}
        if word == "input_scale":
            continue
        if word not in optional or (name == "gptq" and word == "g_idx"):
            folder = write(tmp_path, config, less)
            refuse(lambda folder=folder: read(folder), "")
        wrong = {
            "bool": tensor.to(torch.bool),
            "int16": tensor.to(torch.int16),
            "deep": tensor.reshape(1, 1, 1, *tensor.shape),
            "empty": tensor.flatten()[:0],
            "longer": torch.cat([tensor.reshape(-1).view(torch.uint8)] * 2).view(tensor.dtype),
        }
        if tensor.dim() == 2 and tensor.shape[0] != tensor.shape[1]:
            wrong["transposed"] = tensor.t().contiguous()
            wrong["shorter"] = tensor[:-1]
        for how, harmed in wrong.items():
            folder = write(tmp_path, config, tensors | {word: harmed})
            with pytest.raises(ModelError) as raised:
                read(folder)
            assert "\n" not in str(raised.value), (word, how)


@pytest.mark.parametrize("name", ALL)
def test_truncated_files(tmp_path: Path, everything: dict[str, Made], name: str) -> None:
    config, tensors, _ = everything[name]
    folder = write(tmp_path, config, tensors)
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refuse(lambda: read(folder), str(path))


ODD: list[Any] = [None, 0, -5, 3, 7, 2**31, 10**30, -1, 1.5, NAN, "4", "", [], [4], {}, True, False]
ODD += [[0, 128], [-1, 1], [2**70, 1], ["a", "b"], "re:x", [[[]]], {"a": {}}, "x" * 300]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where in JSON a value can be put in place of another."""
    yield path
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places(inner, (*path, key))


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = new
    return value


def check_harmless(folder: Path) -> bool:
    """A file is refused in one line, or its weight is numbers of the model's shape."""
    try:
        weight = read(folder)
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 800, error
        return False
    dense = weight.dequantize()
    assert dense.shape == (OUT, IN) and dense.isfinite().all()
    return True


@pytest.mark.parametrize(
    "name", ["gptq", "awq", "deepseek", "W4A16", "W8A8", "FP8 block", "NVFP4A16"]
)
def test_configs_of_every_kind(tmp_path: Path, everything: dict[str, Made], name: str) -> None:
    """Each value of the config replaced by values of other types and sizes."""
    config, tensors, _ = everything[name]
    folder = write(tmp_path, config, tensors)
    refused = 0
    for path in places(config):
        for value in ODD:
            changed = put(config, path, value)
            text = json.dumps(CONFIG | {"quantization_config": changed})
            (folder / "config.json").write_text(text)
            try:
                quantization = quantized_config.read_quantization(folder)
                if quantization is not None:
                    quantized_config.scheme_of(MODULE, quantization)
            except ModelError as error:
                assert "\n" not in str(error) and len(str(error)) < 500
                refused += 1
    assert refused > 40


@pytest.mark.parametrize("value", [*ODD[1:], {"quant_method": "awq", "bits": 4}], ids=str)
def test_no_quantization_at_all(tmp_path: Path, everything: dict[str, Made], value: Any) -> None:
    _, tensors, _ = everything["gptq"]
    folder = write(tmp_path, value, tensors)
    refuse(lambda: open_weights(folder, quantized=True), "")


@pytest.mark.parametrize(
    ("name", "change", "word"),
    [
        ("gptq", {"bits": 3}, "bits 3"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("gptq", {"group_size": -5}, "group_size -5"),
        ("gptq", {"group_size": 48}, "groups of 48"),
        ("gptq", {"group_size": "16"}, "'16'"),
        ("gptq", {"checkpoint_format": "marlin"}, "marlin"),
        ("gptq", {"quant_method": "bitsandbytes"}, "bitsandbytes"),
        ("gptq", {"quant_method": ["gptq"]}, "quant_method"),
        ("awq", {"bits": 8}, "bits 8"),
        ("awq", {"version": "gemv"}, "gemv"),
        ("deepseek", {"weight_block_size": [16, 48]}, "48"),
        ("deepseek", {"weight_block_size": [0, 32]}, "weight_block_size"),
        ("deepseek", {"weight_block_size": [16, 32, 1]}, "weight_block_size"),
        ("W8A8", {"format": "marlin-24"}, "marlin-24"),
        ("W8A8", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparse-24"),
        ("W8A8", {"transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ("W8A8", {"config_groups": {}}, "config_groups"),
        ("W8A8", {"config_groups": {"W8A8": ["Linear"]}}, "W8A8"),
    ],
)
def test_configs_that_are_refused(
    tmp_path: Path, everything: dict[str, Made], name: str, change: dict[str, Any], word: str
) -> None:
    config, tensors, _ = everything[name]
    refuse(lambda: read(write(tmp_path, config | change, tensors)), word)


def harm(draw: Any, config: Any, tensors: Tensors) -> tuple[Any, Tensors]:
    """A config and tensors with some bytes, shapes and values changed."""
    tensors = dict(tensors)
    for _ in range(draw(st.integers(1, 3))):
        word = draw(st.sampled_from(sorted(tensors)))
        tensor = tensors[word].clone(memory_format=torch.contiguous_format)
        how = draw(st.sampled_from(["bytes", "bytes", "bytes", "rows", "type", "config", "gone"]))
        if how == "bytes":
            flat = tensor.reshape(-1).view(torch.uint8)
            for _ in range(draw(st.integers(1, 4))):
                if len(flat):
                    flat[draw(st.integers(0, len(flat) - 1))] = draw(st.integers(0, 255))
            tensors[word] = tensor
        elif how == "rows":
            tensors[word] = tensor[: draw(st.integers(0, 3))] if tensor.dim() else tensor
        elif how == "type":
            types = [torch.int32, torch.uint8, torch.float32, torch.float8_e4m3fn, torch.int64]
            tensors[word] = tensor.float().to(draw(st.sampled_from(types)))
        elif how == "gone" and len(tensors) > 1:
            del tensors[word]
        elif how == "config":
            path = draw(st.sampled_from(list(places(config))))
            config = put(config, path, draw(st.sampled_from(ODD)))
    return config, tensors


def fuzz(data: Any, folder: Path, everything: dict[str, Made]) -> None:
    config, tensors, _ = everything[data.draw(st.sampled_from(sorted(everything)))]
    config, tensors = harm(data.draw, config, tensors)
    check_harmless(write(folder, config, tensors))


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_files_of_every_kind(
    data: Any, tmp_path_factory: pytest.TempPathFactory, everything: dict[str, Made]
) -> None:
    fuzz(data, tmp_path_factory.getbasetemp() / "fuzz", everything)


@pytest.mark.long
@settings(max_examples=5000, deadline=None)
@given(data=st.data())
def test_many_files_of_every_kind(
    data: Any, tmp_path_factory: pytest.TempPathFactory, everything: dict[str, Made]
) -> None:
    fuzz(data, tmp_path_factory.getbasetemp() / "fuzz", everything)


# GGUF.

HEADS, KV_HEADS, HIDDEN, FEED = 4, 2, 64, 96


def gguf_shapes() -> dict[str, tuple[int, ...]]:
    kv = HIDDEN // HEADS * KV_HEADS
    return {
        "token_embd.weight": (32, HIDDEN),
        "blk.0.attn_norm.weight": (HIDDEN,),
        "blk.0.attn_q.weight": (HIDDEN, HIDDEN),
        "blk.0.attn_k.weight": (kv, HIDDEN),
        "blk.0.attn_v.weight": (kv, HIDDEN),
        "blk.0.attn_output.weight": (HIDDEN, HIDDEN),
        "blk.0.ffn_norm.weight": (HIDDEN,),
        "blk.0.ffn_gate.weight": (FEED, HIDDEN),
        "blk.0.ffn_up.weight": (FEED, HIDDEN),
        "blk.0.ffn_down.weight": (HIDDEN, FEED),
        "output_norm.weight": (HIDDEN,),
    }


def write_gguf(
    path: Path, kind: str, arch: str = "llama", more: Callable[[Any], None] = lambda writer: None
) -> dict[str, np.ndarray]:
    """A tiny Llama by gguf's own writer; what gguf's own dequantisation makes of it, as written.

    more: adds to what is written."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    writer.add_uint32(f"{arch}.attention.head_count", HEADS)
    writer.add_uint32(f"{arch}.attention.head_count_kv", KV_HEADS)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_string("general.name", "tiny")
    more(writer)
    rng, dense = np.random.default_rng(0), {}
    for name, shape in gguf_shapes().items():
        values = rng.standard_normal(shape).astype(np.float32)
        chosen = "F32" if len(shape) == 1 else "Q8_0" if name == "token_embd.weight" else kind
        type_ = gguf.GGMLQuantizationType[chosen]
        data = gguf.quants.quantize(values, type_)
        dense[name] = gguf.quants.dequantize(data, type_)
        writer.add_tensor(name, data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


def dense_of(weight: QuantizedWeight | torch.Tensor) -> np.ndarray:
    found = weight.float() if isinstance(weight, torch.Tensor) else weight.dequantize()
    return found.numpy()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "F16", "BF16"])
def test_gguf(tmp_path: Path, kind: str) -> None:
    """Bit for bit what gguf's own dequantisation has, but for the order of q's and k's rows."""
    dense = write_gguf(tmp_path / "tiny.gguf", kind)
    header = read_gguf_header(tmp_path / "tiny.gguf")
    check_tensors(header)
    found = dict(gguf_weights(header, HEADS, KV_HEADS))
    assert len(found) == len(dense)
    down = found["model.layers.0.mlp.down_proj.weight"]
    assert np.array_equal(dense_of(down), dense["blk.0.ffn_down.weight"])
    assert isinstance(down, QuantizedWeight) == kind.startswith("Q")
    embedding = dense_of(found["model.embed_tokens.weight"])
    assert np.array_equal(embedding, dense["token_embd.weight"])
    for name, heads in (("q", HEADS), ("k", KV_HEADS)):
        written = dense[f"blk.0.attn_{name}.weight"]
        pairs = written.reshape(heads, -1, 2, HIDDEN)  # the halves of a rotary pair are neighbours
        expected = np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], 1).reshape(written.shape)
        read_back = dense_of(found[f"model.layers.0.self_attn.{name}_proj.weight"])
        assert np.array_equal(read_back, expected) and not np.array_equal(read_back, written)


@pytest.mark.parametrize("kind", ["Q5_0", "Q5_1"])
def test_gguf_types_that_are_not_read(tmp_path: Path, own_cache: Path, kind: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", kind)
    refuse(lambda: gguf_model(tmp_path / "tiny.gguf"), "blk.0.attn_q.weight", kind)


def header_end(path: Path) -> int:
    return min(tensor.begin for tensor in read_gguf_header(path).tensors.values())


def opens(path: Path, known: Any = None) -> bool:
    """Whether a file is not refused. Asserts how it is refused.

    known: tensors as they are, whose data need not be read again.
    """
    try:
        header = read_gguf_header(path)
        check_tensors(header)
        if header.tensors != known:
            for _, weight in gguf_weights(header, HEADS, KV_HEADS):
                assert weight.nbytes
    except ModelError as error:
        assert "\n" not in str(error) and len(str(error)) < 600
        return False
    return True


def test_every_byte_of_a_gguf_header(tmp_path: Path) -> None:
    """Every place overwritten by integers of 4 and 8 bytes."""
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "Q4_1")
    whole, end = path.read_bytes(), header_end(path)
    assert opens(path)
    known = read_gguf_header(path).tensors
    numbers = [struct.pack("<I", n) for n in (0, 2**32 - 1)]
    numbers += [struct.pack("<Q", n) for n in (2**61, 2**64 - 1)]
    refused = 0
    for place in range(end):
        for number in numbers if place < 24 else numbers[place % 2 :: 2]:
            with path.open("r+b") as file:
                file.seek(place)
                file.write(number)
                file.flush()
                refused += not opens(path, known)
                file.seek(place)
                file.write(whole[place : place + len(number)])
    assert refused > end


def test_truncated_gguf(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, "Q4_0")
    whole, end = path.read_bytes(), header_end(path)
    sizes = [*range(0, end, 3), *range(end, len(whole), 9973), len(whole) - 33]
    for size in sorted(sizes, reverse=True):
        os.truncate(path, size)
        assert not opens(path), size


def pair(key: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + value


def info(name: str, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    begin = struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", len(dims))
    return begin + b"".join(struct.pack("<Q", n) for n in dims) + struct.pack("<IQ", kind, offset)


def gguf_bytes(
    pairs: list[bytes], infos: list[bytes], counts: Any = None, version: int = 3
) -> bytes:
    tensors, values = counts or (len(infos), len(pairs))
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, values)
    return head + b"".join(pairs) + b"".join(infos) + bytes(4096)


U32 = struct.Struct("<I").pack
TENSOR = info("output_norm.weight", [64])
HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "GGUF"),
    "other magic": (b"GGML" + bytes(100), "begin with GGUF"),
    "version 1": (gguf_bytes([], [TENSOR], version=1), "version is 1"),
    "big-endian": (gguf_bytes([], [TENSOR], version=3 << 24), "version"),
    "2^32 - 1 tensors": (
        gguf_bytes([], [TENSOR], (2**32 - 1, 0)),
        "number of tensors is 4294967295",
    ),
    "2^64 - 1 values": (gguf_bytes([], [TENSOR], (1, 2**64 - 1)), "number of values"),
    "alignment 0": (gguf_bytes([pair("general.alignment", 4, U32(0))], [TENSOR]), "alignment is 0"),
    "alignment 3": (gguf_bytes([pair("general.alignment", 4, U32(3))], [TENSOR]), "alignment is 3"),
    "alignment 2^31": (
        gguf_bytes([pair("general.alignment", 4, U32(2**31))], [TENSOR]),
        "alignment",
    ),
    "alignment text": (
        gguf_bytes([pair("general.alignment", 8, struct.pack("<Q", 1) + b"x")], [TENSOR]),
        "alignment is 'x'",
    ),
    "a long key": (gguf_bytes([struct.pack("<Q", 2**63)], [], (0, 1)), "a key"),
    "a long text": (gguf_bytes([pair("a", 8, struct.pack("<Q", 2**60))], [TENSOR]), "'a'"[1:2]),
    "a long array": (gguf_bytes([pair("a", 9, struct.pack("<IQ", 4, 2**62))], [TENSOR]), "left"),
    "words": (gguf_bytes([pair("a", 9, struct.pack("<IQ", 8, 2**40))], [TENSOR]), "left"),
    "arrays of arrays": (gguf_bytes([pair("a", 9, struct.pack("<IQ", 9, 1))], [TENSOR]), "type 9"),
    "type 13": (gguf_bytes([pair("a", 13, U32(0))], [TENSOR]), "type 13"),
    "a key twice": (gguf_bytes([pair("a", 4, U32(0))] * 2, [TENSOR]), "'a' twice"),
    "not UTF-8": (gguf_bytes([pair("a", 8, struct.pack("<Q", 1) + b"\xff")], [TENSOR]), "UTF-8"),
    "a tensor twice": (gguf_bytes([], [TENSOR, TENSOR]), "twice"),
    "overlapping": (gguf_bytes([], [TENSOR, info("x", [64], offset=32)]), "overlap"),
    "beyond the end": (gguf_bytes([], [info("output_norm.weight", [64], offset=4096)]), "lies at"),
    "offset 2^64": (gguf_bytes([], [info("x", [64], offset=2**64 - 32)]), "lies at"),
    "offset 1": (gguf_bytes([], [info("x", [64], offset=1)]), "lies at 1"),
    "no dimensions": (gguf_bytes([], [info("x", [])]), "0 dimensions"),
    "5 dimensions": (gguf_bytes([], [info("x", [1] * 5)]), "5 dimensions"),
    "overflowing": (gguf_bytes([], [info("x", [2**32, 2**32])]), "x"),
    "overflowing to 0": (gguf_bytes([], [info("x", [2**63, 2])]), "x"),
    "empty": (gguf_bytes([], [info("x", [0])]), "[0]"),
    "half a block": (gguf_bytes([], [info("x", [48, 2], 3)]), "blocks of 32"),
    "Q4_K": (gguf_bytes([], [info("output.weight", [256, 2], 12)]), "Q4_K"),
    "Q6_K": (gguf_bytes([], [info("output.weight", [256, 2], 14)]), "Q6_K"),
    "type 2^31": (gguf_bytes([], [info("output.weight", [64, 2], 2**31)]), "type 2147483648"),
    "a vector of Q4_1": (gguf_bytes([], [info("output_norm.weight", [64], 3)]), "Q4_1"),
    "another model's": (gguf_bytes([], [info("blk.0.ssm_in.weight", [64])]), "ssm_in"),
    "lines": (gguf_bytes([pair("a\nb", 13, U32(0))], [TENSOR]), "type 13"),
    "lines of a name": (gguf_bytes([], [info("a\nb", [0])]), "[0]"),
    "rope_freqs": (gguf_bytes([], [info("rope_freqs.weight", [32])]), "rope_freqs"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_gguf(tmp_path: Path, name: str) -> None:
    data, word = HOSTILE[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)

    def action() -> None:
        check_tensors(read_gguf_header(path))

    tracemalloc.start()
    try:
        refuse(action, word, str(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_gguf_scales_that_are_no_numbers(tmp_path: Path, kind: str, value: float) -> None:
    path = tmp_path / "tiny.gguf"
    write_gguf(path, kind)
    begin = read_gguf_header(path).tensors["blk.0.ffn_up.weight"].begin
    for place in (begin, begin + 2) if kind == "Q4_1" else (begin,):
        data = bytearray(path.read_bytes())
        data[place : place + 2] = struct.pack("<e", value)
        path.write_bytes(data)
        header = read_gguf_header(path)
        refuse(lambda header=header: list(gguf_weights(header, HEADS, KV_HEADS)), "ffn_up", "scale")


def test_other_architectures_are_refused(tmp_path: Path, own_cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", "Q4_0", "gpt2")
    refuse(lambda: gguf_model(tmp_path / "tiny.gguf"), "general.architecture", "gpt2")


def add_scaling(writer: Any) -> None:
    writer.add_string("llama.rope.scaling.type", "linear")
    writer.add_float32("llama.rope.scaling.factor", 4.0)


OTHER_LLAMAS = {
    "scaled": (add_scaling, "llama.rope.scaling.type 'linear'"),
    "scaled, as old files say it": (
        lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0),
        "llama.rope.scale_linear 4.0",
    ),
    "biases": (
        lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(HIDDEN, np.float32)),
        "blk.0.attn_q.bias",
    ),
}


@pytest.mark.parametrize("name", OTHER_LLAMAS)
def test_what_would_make_it_another_model(tmp_path: Path, own_cache: Path, name: str) -> None:
    more, words = OTHER_LLAMAS[name]
    write_gguf(tmp_path / "tiny.gguf", "Q4_0", more=more)
    refuse(lambda: gguf_model(tmp_path / "tiny.gguf"), "tiny.gguf", words)


def test_few_folders_of_gguf_files_are_kept(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A scaling of `none` is none."""
    monkeypatch.setattr(
        gguf_module, "_write_words", lambda source, folder: (folder / "config.json").write_text("")
    )
    folders = []
    for number in range(gguf_module.KEPT + 2):
        path = tmp_path / f"{number}.gguf"
        write_gguf(path, "Q4_0", more=lambda w: w.add_string("llama.rope.scaling.type", "none"))
        folders.append(gguf_model(path))
        os.utime(folders[0] / "manifest.json", ns=(number, number)) if number == 0 else None
    assert {path for path in own_cache.iterdir() if path.is_dir()} == set(folders[2:])


def test_the_embedded_file_as_it_is() -> None:
    """Its Q4_1 and Q8_0 weights are those of the float32 folder, bit for bit."""
    if embedded.gguf_path() is None:
        pytest.skip(f"the package {embedded.PACKAGE} is not installed")
    plain, folder = resolve("smollm2-135m"), resolve("smollm2-135m-q4_1")
    source, expected = open_weights(folder, quantized=True), open_weights(plain)
    assert source.names == expected.names
    num_bytes, kinds = 0, set()
    for name, header in read_headers(plain).items():
        weight = source.quantized(name, header.shape)
        if weight is None:
            assert len(header.shape) == 1
            found = source.read(name, header.shape)
        else:
            num_bytes += weight.nbytes
            kinds.add((weight.kind, weight.group))
            found = weight.dequantize()
        assert torch.equal(found, expected.read(name, header.shape)), name
    assert kinds == {("uint4", 32), ("int8", 32)}
    assert num_bytes == embedded_bytes()
    refuse(lambda: load_config(folder), "quantised")
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (plain / name).read_bytes(), name


def embedded_bytes() -> int:
    """Of the quantised tensors in the file: nothing is added."""
    path = embedded.gguf_path()
    assert path is not None
    tensors = read_gguf_header(path).tensors.values()
    return sum(tensor.end - tensor.begin for tensor in tensors if tensor.type.startswith("Q"))


# The cache of weights quantised on load.


@pytest.fixture
def cache(tmp_path: Path, own_cache: Path) -> Path:
    config, tensors, _ = gptq()
    write(tmp_path / "model", config, tensors)
    return own_cache / "quantized"


def sample() -> dict[str, QuantizedWeight]:
    """Every field and type that a weight can have, with sizes that need padding."""
    kinds = {
        "a": QuantizedWeight("int8", torch.ones(3, 5, dtype=torch.int8), torch.rand(3, 1), 5),
        "b": QuantizedWeight(
            "uint4",
            torch.randint(0, 256, (3, 8), dtype=torch.uint8),
            torch.rand(3, 2).half(),
            8,
            minimums=torch.rand(3, 2),
            order=torch.randperm(16),
            activations="int8",
        ),
        "c": QuantizedWeight(
            "fp4_e2m1",
            torch.randint(0, 256, (3, 8), dtype=torch.uint8),
            torch.rand(3, 1).to(torch.float8_e4m3fn),
            16,
            row_scales=torch.rand(3),
        ),
        "d": QuantizedWeight(
            "fp8_e4m3",
            torch.rand(3, 32).to(torch.float8_e4m3fn),
            torch.full((3, 1), 120, dtype=torch.uint8).view(torch.float8_e8m0fnu),
            32,
            activations="fp8",
        ),
        "e": QuantizedWeight(
            "nf4", torch.zeros(1, 1, dtype=torch.uint8), torch.rand(1, 1).bfloat16(), 2
        ),
    }
    return {f"model.{name}.weight": weight for name, weight in kinds.items()}


class Builder:
    """Counts how often weights are asked for."""

    def __init__(self, weights: dict[str, QuantizedWeight] | None = None) -> None:
        self.weights, self.calls = weights or sample(), 0

    def __call__(self) -> Iterator[tuple[str, QuantizedWeight]]:
        self.calls += 1
        yield from self.weights.items()


def same(one: dict[str, QuantizedWeight], other: dict[str, QuantizedWeight]) -> bool:
    def bits(weight: QuantizedWeight) -> list[Any]:
        found = [weight.kind, weight.group, weight.activations]
        for name, tensor in weight.tensors.items():
            shape = list(tensor.shape)
            raw = tensor.contiguous().flatten().view(torch.uint8).tolist()
            found += [name, str(tensor.dtype), shape, raw]
        return found

    return {n: bits(w) for n, w in one.items()} == {n: bits(w) for n, w in other.items()}


def test_kept_weights(cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build, model = Builder(), tmp_path / "model"
    first = cached_weights(model, "int4", build)
    second = cached_weights(model, "int4", build)
    assert build.calls == 1 and capsys.readouterr().err == ""
    assert same(first, build.weights) and same(second, build.weights)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(cache) in maps.read_text()
    for weight in second.values():
        assert all(tensor.data_ptr() % 64 == 0 for tensor in weight.tensors.values())


def test_other_weights_are_not_mistaken(cache: Path, tmp_path: Path) -> None:
    """Another recipe, another version, and a checkpoint that has changed."""
    build, model = Builder(), tmp_path / "model"
    cached_weights(model, "int4", build)
    cached_weights(model, "int8", build)
    assert build.calls == 2
    path = model / "model.safetensors"
    save_file({"model.norm.weight": torch.zeros(IN)}, path)
    cached_weights(model, "int4", build)
    assert build.calls == 3
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 33}))
    cached_weights(model, "int4", build)
    assert build.calls == 4


def test_folders_that_look_alike_are_not_mistaken(cache: Path, tmp_path: Path) -> None:
    """Other weights under the same names, sizes and times; and a file that is no text."""
    build, model, other = Builder(), tmp_path / "model", tmp_path / "other"
    shutil.copytree(model, other)
    times = (model / "model.safetensors").stat().st_mtime_ns
    data = (model / "model.safetensors").read_bytes()
    for number, folder in enumerate((model, other, model)):
        path = folder / "model.safetensors"
        path.write_bytes(data[:-1] + bytes([number]))
        os.utime(path, ns=(times, times))
        (folder / "manifest.json").write_bytes(b"\xff\xfe")
        cached_weights(folder, "int4", build)
    assert build.calls == 3
    shutil.copyfile(model / "model.safetensors", other / "model.safetensors")
    os.utime(other / "model.safetensors", ns=(times, times))
    cached_weights(other, "int4", build)
    assert build.calls == 4, "the samples are equal, but what lies between them may differ"


def test_what_killed_makers_left_is_removed(cache: Path, tmp_path: Path) -> None:
    left, busy = cache / ".0f.x1y2.tmp", cache / ".1f.x1y2.tmp"
    for folder in (left, busy):
        folder.mkdir(parents=True)
        (folder / "shard-0.safetensors").write_bytes(bytes(100))
    assert lock_of(cache / "0f").lock_file != lock_of(cache / "1f").lock_file
    with lock_of(cache / "1f"):
        cached_weights(tmp_path / "model", "int4", Builder())
        assert not left.exists() and busy.exists()
    assert len({lock_of(cache / str(number)).lock_file for number in range(200)}) == NUM_LOCKS


def test_few_are_kept(cache: Path, tmp_path: Path) -> None:
    build, model = Builder(), tmp_path / "model"
    for number in range(quantized_cache.KEPT + 3):
        cached_weights(model, str(number), build)
    kept = [path for path in cache.iterdir() if path.is_dir()]
    assert len(kept) == quantized_cache.KEPT
    calls = build.calls
    cached_weights(model, str(quantized_cache.KEPT + 2), build)
    assert build.calls == calls  # the last one is among them


@pytest.mark.parametrize("how", ["short", "gone", "no manifest", "zeros", "description", "other"])
def test_damaged_ones_are_made_again(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    build, model = Builder(), tmp_path / "model"
    cached_weights(model, "int4", build)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    path = folder / "model.safetensors"
    if how == "short":
        path.write_bytes(path.read_bytes()[:-1])
    elif how == "gone":
        path.unlink()
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "zeros":
        path.write_bytes(bytes(path.stat().st_size))
    elif how == "description":
        found = (folder / "quantized.json").read_text()
        (folder / "quantized.json").write_text("[" * len(found))
    else:
        found = (folder / "quantized.json").read_text()
        (folder / "quantized.json").write_text(found.replace("nf4", "nf5"))
    assert same(cached_weights(model, "int4", build), build.weights)
    assert build.calls == 2 and "damaged" in capsys.readouterr().err
    assert same(cached_weights(model, "int4", build), build.weights) and build.calls == 2


@pytest.mark.parametrize("why", ["full", "unwritable"])
def test_where_nothing_can_be_kept(
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    why: str,
) -> None:
    build, model = Builder(), tmp_path / "model"
    if why == "full":

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("common.models.weight_writer.WeightWriter.append", fail)
    else:
        (tmp_path / "cache").write_text("a file")
    assert same(cached_weights(model, "int4", build), build.weights)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "not kept" in lines[0]
    if why == "full":
        assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_what_building_raises_is_raised(cache: Path, tmp_path: Path) -> None:
    def build() -> Iterator[tuple[str, QuantizedWeight]]:
        yield from sample().items()
        raise ModelError("the checkpoint lacks x")

    with pytest.raises(ModelError, match="lacks x"):
        cached_weights(tmp_path / "model", "int4", build)
    assert [path for path in cache.iterdir() if path.is_dir()] == []


def test_one_weight_at_a_time(cache: Path, tmp_path: Path) -> None:
    """Writing holds one of the weights, not all."""
    alive: list[int] = []

    def build() -> Iterator[tuple[str, QuantizedWeight]]:
        import weakref

        made: list[weakref.ref[torch.Tensor]] = []
        for number in range(6):
            codes = torch.full((4, 8), number, dtype=torch.int8)
            made.append(weakref.ref(codes))
            yield f"w{number}", QuantizedWeight("int8", codes, torch.ones(4, 1), 8)
            del codes
            alive.append(sum(found() is not None for found in made))

    weights = cached_weights(tmp_path / "model", "int8", build)
    assert max(alive) <= 2, alive
    assert [int(weight.codes[0, 0]) for weight in weights.values()] == list(range(6))


# A stranger's folder in our own layout.


def stored(folder: Path) -> tuple[Path, dict[str, QuantizedWeight]]:
    weights = {
        NAME: QuantizedWeight("int8", torch.ones(OUT, IN, dtype=torch.int8), torch.rand(OUT, 2), 32)
    }
    folder.mkdir(exist_ok=True)
    write_weights(folder, weights.items())
    quantization = {"quant_method": "gguf", "file": "x.gguf"}
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": quantization}))
    return folder, weights


def test_stored_weights(tmp_path: Path) -> None:
    folder, weights = stored(tmp_path / "model")
    assert torch.equal(read(folder).dequantize(), weights[NAME].dequantize())


@pytest.mark.parametrize(
    "change",
    [
        ("int8", "nf4"),
        ("int8", "x"),
        ("32", "0"),
        ("32", "-32"),
        ("32", "48"),
        ("32", '"32"'),
        ("32", "1e400"),
        ("null", '"int4"'),
        ("{", "["),
        (NAME, "x"),
    ],
    ids=str,
)
def test_a_strangers_stored_weights(tmp_path: Path, change: tuple[str, str]) -> None:
    folder, _ = stored(tmp_path / "model")
    path = folder / "quantized.json"
    path.write_text(path.read_text().replace(*change))
    refuse(lambda: read(folder), "")


def test_notes_are_for_people(tmp_path: Path) -> None:
    config, tensors, _ = compressed("W8A8")
    group = config["config_groups"]["group_0"]
    group["input_activations"] = INT8_INPUTS | {"strategy": "tensor", "dynamic": False}
    source: WeightSource = open_weights(write(tmp_path, config, tensors), quantized=True)
    (note,) = source.notes
    assert re.search("fixed scales", note)
    config["kv_cache_scheme"] = {"num_bits": 8, "type": "float"}
    quantization = read_quantization(write(tmp_path, config, tensors))
    assert quantization is not None and "kv_cache_scheme" in quantization.notes[0]
    shutil.rmtree(tmp_path)


def test_gguf_without_a_tokenizer(tmp_path: Path, own_cache: Path) -> None:
    """transformers makes nothing of it: one line, and no folder is left."""
    write_gguf(tmp_path / "tiny.gguf", "Q4_0")
    refuse(lambda: resolve(str(tmp_path / "tiny.gguf")), "tiny.gguf", "config or tokenizer")
    assert [path for path in own_cache.iterdir() if path.is_dir()] == []


@pytest.mark.long
def test_a_local_gguf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the embedded file under another name is the same model, words and all."""
    source = embedded.gguf_path()
    if source is None:
        pytest.skip(f"the package {embedded.PACKAGE} is not installed")
    known = resolve("smollm2-135m-q4_1")
    monkeypatch.setenv("FIFTEEN_ENGINES_CACHE", str(tmp_path / "cache"))
    shutil.copyfile(source, tmp_path / "copy.gguf")
    folder = resolve(str(tmp_path / "copy.gguf"))
    for name in ("tokenizer.json", "chat_template.jinja", "model.safetensors", "quantized.json"):
        assert (folder / name).read_bytes() == (known / name).read_bytes(), name
