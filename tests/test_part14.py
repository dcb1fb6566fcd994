"""Part 14's own invariants: numbers are rounded as each format says, bit for bit, and all that is built on
the products gives the tokens of the rounded model.

What the tokens must be is known from a folder with the rounded weights in float32, which part 01 runs with
transformers, and which the oracle has checked.
"""

import atexit
import hashlib
import json
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from part14.model import Weights
from part14.quantization import FORMATS, dynamic_map, quantize_nf4, quantize_twice, round_e2m1
from part14.quantized_layers import QuantizedSource, Recipe, copy_that_drafts
from part14.ranks import fingerprint
from part14.tensor_parallel import Features
from safetensors.torch import save_file
from torch import Tensor

from common.kernels.quantized import QuantizedWeight, unpack_nibbles
from common.models.checkpoint import resolve
from common.models.quantized_stored import write_weights
from common.models.weight_slices import open_weights
from common.sampling import SamplingParams
from common.testing.parts import make_engine, module_of
from common.testing.rank_threads import engine_in_threads
from common.testing.schedules import Drive, Event, known_requests
from common.testing.transfer_pair import pair

LLAMA, QWEN3, MOE = "random:tiny-llama", "random:tiny-qwen3", "random:tiny-qwen3-moe"
SMALL = {"block_size": 4, "num_blocks": 17, "max_num_seqs": 8, "max_num_batched_tokens": 20}


def weights(rows: int = 48, columns: int = 256, seed: int = 0) -> Tensor:
    """Normal weights with what is rare in them: outliers, zeros, a row of zeros, tiny numbers."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.05
    weight[:, 5] *= 20
    weight[1], weight[2, :64], weight[3] = 0, 0, weight[3] * 1e-6
    weight[4, 7] = 3.0
    return weight


# Each format, against somebody else's.


def as_e4m3(x: np.ndarray) -> np.ndarray:
    return x.astype(ml_dtypes.float8_e4m3fn)


def test_e4m3_is_that_of_ml_dtypes() -> None:
    for block in ("fp8", "fp8-channel", "fp8-block"):
        weight = weights(130, 256)
        found = FORMATS[block](weight)
        scales = np.repeat(found.scales.numpy(), found.group, axis=1)
        scaled = np.divide(weight.numpy(), scales, out=np.zeros_like(scales), where=scales != 0)
        assert (found.codes.view(torch.uint8).numpy() == as_e4m3(scaled).view(np.uint8)).all()
        largest = np.abs(weight.numpy())
        if block == "fp8":
            expected = np.full((130, 1), largest.max())
        elif block == "fp8-channel":
            expected = largest.max(axis=1, keepdims=True)
        else:
            squares = [largest[i : i + 128, j : j + 128].max() for i in (0, 128) for j in (0, 128)]
            expected = np.repeat(np.array(squares).reshape(2, 2), [128, 2], axis=0)
        assert (found.scales.numpy() == (expected / np.float32(448)).astype(np.float32)).all()


def test_e2m1_is_that_of_ml_dtypes_ties_and_all() -> None:
    eighths = torch.arange(-60, 61) / 8  # all ties are among them
    x = torch.cat([eighths, torch.randn(1000, generator=torch.Generator().manual_seed(1)) * 3])
    clamped = x.clamp(-6, 6).numpy()
    expected = clamped.astype(ml_dtypes.float4_e2m1fn).view(np.uint8) & 15
    found = round_e2m1(x).numpy()
    is_zero = expected % 8 == 0  # the sign of a zero is nobody's concern
    assert (found[~is_zero] == expected[~is_zero]).all() and (found[is_zero] % 8 == 0).all()
    wanted = {0.25: 0, 0.75: 2, 1.25: 2, 1.75: 4, 2.5: 4, 3.5: 6, 5.0: 6}
    assert {value: int(round_e2m1(torch.tensor([value]))) for value in wanted} == wanted


@pytest.mark.parametrize("name", ["mxfp8", "mxfp4"])
def test_microscaling_formats_are_those_of_ml_dtypes_by_the_formula(name: str) -> None:
    """(torchao 0.18 gives the same codes and scales; it is not among the packages that tests need, since
    transformers imports it wherever it is installed.)"""
    weight = weights()
    found = FORMATS[name](weight)
    blocks = weight.numpy().reshape(48, 8, 32)
    largest = np.abs(blocks).max(axis=2)
    exponents = np.floor(np.log2(largest, where=largest > 0, out=np.zeros_like(largest)))
    wanted = np.exp2(exponents - (8 if name == "mxfp8" else 2)).astype(ml_dtypes.float8_e8m0fnu)
    is_used = largest > 0  # any scale makes zeros of zeros
    scales = found.scales.view(torch.uint8).numpy().view(ml_dtypes.float8_e8m0fnu)
    assert (scales[is_used] == wanted[is_used]).all()
    scaled = blocks / wanted.astype(np.float32)[..., None]
    if name == "mxfp8":
        codes = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn)
    else:
        codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    ours = found.values().numpy().reshape(blocks.shape)
    assert (ours[is_used] == codes.astype(np.float32)[is_used]).all()


def test_nvfp4_is_that_of_ml_dtypes_by_the_formula() -> None:
    weight = weights()
    found = FORMATS["nvfp4"](weight)
    blocks = weight.numpy().reshape(48, 16, 16)
    multiplier = np.float32(448 * 6) / np.abs(blocks).max()
    scales = as_e4m3(multiplier * np.abs(blocks).max(axis=2) / np.float32(6))
    assert (found.scales.view(torch.uint8).numpy() == scales.view(np.uint8)).all()
    wide = scales.astype(np.float32)[..., None]
    scaled = np.divide(blocks * multiplier, wide, out=np.zeros_like(blocks), where=wide != 0)
    codes = np.clip(scaled, -6, 6).astype(ml_dtypes.float4_e2m1fn)
    expected = codes.astype(np.float32) * wide / multiplier
    found = found.dequantize().numpy().reshape(blocks.shape)
    np.testing.assert_allclose(found, expected, rtol=3e-7)


def test_int8_and_int4_are_those_of_compressed_tensors_for_the_same_scales() -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize

    weight = weights()
    for name, bits, group in (
        ("int8", 8, None),
        ("int4", 4, 32),
        ("int4-g64", 4, 64),
        ("int4-g128", 4, 128),
    ):
        found = FORMATS[name](weight)
        strategy = "channel" if group is None else "group"
        args = QuantizationArgs(num_bits=bits, group_size=group, strategy=strategy, symmetric=True)
        scales = found.scales.float()
        safe = torch.where(scales == 0, 1, scales)
        codes = quantize(weight, safe, torch.zeros_like(safe), args)
        ours = found.values() if bits == 4 else found.codes.float()
        assert torch.equal(ours, codes.float()), name
        largest = weight.unflatten(1, (-1, found.group)).abs().amax(-1)
        expected = largest / 127 if bits == 8 else (largest / 7.5).half().float()
        assert torch.equal(scales, expected)


@pytest.mark.parametrize(("name", "kind"), [("uint4", "Q4_1"), ("int8-g32", "Q8_0")])
def test_blocks_of_llama_cpp_mean_the_same(name: str, kind: str) -> None:
    """The codes and scales as a GGUF file has them, and what gguf reads out of it."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    found = FORMATS[name](weights())
    scales = found.scales.numpy()[..., None].view(np.uint8)
    if kind == "Q8_0":
        parts = [scales, found.codes.view(48, 8, 32).view(torch.uint8).numpy()]
    else:
        codes = unpack_nibbles(found.codes).view(48, 8, 2, 16)
        packed = (codes[:, :, 0] | codes[:, :, 1] << 4).numpy()
        parts = [scales, found.minimums.numpy()[..., None].view(np.uint8), packed]
    blocks = np.concatenate(parts, axis=2)
    expected = dequantize(blocks.reshape(48, -1), GGMLQuantizationType[kind])
    assert (found.dequantize().numpy() == expected).all()


# What bitsandbytes 0.50.2 makes of the weight below: the hash of its codes, one a byte, and of the table that
# its second quantisation uses.
NF4_CODES = "ced13c76f905de82a4476aa8e5570fd21fd73a19b2f8943ef2821ed0ef35c3a1"
DYNAMIC_MAP = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"


def digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


def test_nf4_is_that_of_bitsandbytes() -> None:
    i = torch.arange(64 * 768, dtype=torch.float64)
    weight = (torch.sin(i * i * 0.37) * torch.cos(i * 0.013) * 0.2).float().view(64, 768)
    found = quantize_nf4(weight)
    assert digest(unpack_nibbles(found.codes)) == NF4_CODES
    assert digest(dynamic_map()) == DYNAMIC_MAP
    scales = weight.unflatten(1, (-1, 64)).abs().amax(-1)
    error = (quantize_twice(scales) - scales).abs().max() / (scales - scales.mean()).abs().max()
    assert 0 < error < 0.0078  # half of the widest step of the table


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_as_near_as_its_codes_are(name: str) -> None:
    """No other code of the format, with the same scale, is nearer; zeros stay; nothing is infinite."""
    weight = weights()
    found = FORMATS[name](weight)
    if name == "nf4":  # codes are chosen before the scales are rounded
        found = replace(found, scales=weight.unflatten(1, (-1, 64)).abs().amax(-1))
    back = found.dequantize()
    assert back.isfinite().all() and back.shape == weight.shape
    if name != "uint4":
        assert (back[1] == 0).all()
    error = (back - weight).abs()
    codes = range(256) if found.codes.shape == weight.shape else range(16)
    for code in codes:
        byte = torch.full(found.codes.shape, code | (code << 4) if len(codes) == 16 else code)
        other = replace(found, codes=byte.to(torch.uint8).view(found.codes.dtype)).dequantize()
        other = other.nan_to_num(torch.inf, torch.inf, torch.inf)
        if name in ("int8", "int8-g32") and code == 128:
            continue  # -128 is not used
        nearer = (other - weight).abs() < error * (1 - 1e-5) - 1e-9
        assert not nearer.any(), (code, weight[nearer][:3], back[nearer][:3], other[nearer][:3])


BITS = {
    "int8": 8 + 32 / 256, "int8-g32": 8.5, "int4": 4.5, "int4-g64": 4.25, "int4-g128": 4.125, "uint4": 5.0,
    "fp8": 8 + 32 / 256, "fp8-channel": 8 + 32 / 256, "fp8-block": 8.25, "mxfp8": 8.25, "mxfp4": 4.25,
    "nvfp4": 4.5 + 32 / 256, "nf4": 4.5,
}  # fmt: skip


def test_bytes_are_those_of_the_formula() -> None:
    assert {name: FORMATS[name](weights()).nbytes * 8 / (48 * 256) for name in FORMATS} == BITS


def test_a_group_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="96 inputs are no multiple of the group, 64"):
        FORMATS["int4-g64"](weights(8, 96))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("cuts", [(0, 80), (80, 160), (64, 96), (2, 6)])
def test_a_part_of_a_weight_is_that_part_of_the_whole(name: str, cuts: tuple[int, int]) -> None:
    whole = FORMATS[name](weights(40, 256))
    part = whole.columns(slice(*cuts)).rows(slice(3, 17))
    assert torch.equal(part.dequantize(), whole.dequantize()[3:17, slice(*cuts)])


# Engines.


TOKENIZER: list[str] = []


@pytest.fixture(autouse=True, scope="module")
def tokenizer(tokenizer_json: str) -> None:
    TOKENIZER.append(tokenizer_json)


@cache
def rounded_folder(model: str, format_name: str) -> str:
    """A folder with what a format makes of a model's weights, in float32."""
    recipe = Recipe.of(format_name, "auto", "off")
    folder = resolve(model)
    source = QuantizedSource(open_weights(folder, quantized=True), folder, recipe)
    tensors = {}
    for name in sorted(source.names):
        shape = tuple(source.source.shapes[name])
        weight = source.quantized(name, shape) if len(shape) == 2 else None
        tensors[name] = source.read(name, shape) if weight is None else weight.dequantize()
    target = Path(tempfile.mkdtemp(prefix="rounded-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    save_file({n: t.contiguous().clone() for n, t in tensors.items()}, target / "model.safetensors")
    shutil.copy(folder / "config.json", target)
    (target / "tokenizer.json").write_text(TOKENIZER[0])
    return str(target)


@pytest.fixture
def making() -> Iterator[Callable[..., Any]]:
    """Makes engines, and ends them."""
    engines: list[Any] = []

    def make(model: str, format_name: str, **flags: Any) -> Any:
        options = {"threads": 1, "quantization": format_name, **SMALL, **flags}
        engines.append(make_engine(14, model, **options))
        return engines[-1]

    yield make
    for engine in engines:
        engine.shutdown()


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


# What later chapters brought, each with formats in turn. The pool of 17 blocks is so small that sequences
# are preempted, and the budget of 20 tokens cuts prompts into slices.
TECHNIQUES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "one at a time": {"max_num_seqs": 1, "num_blocks": 200, "block_size": 5},
    "whole prompts": {"max_num_batched_tokens": 2048, "num_blocks": 40},
    "radix": {"prefix_cache": "radix", "num_blocks": 40},
    "no prefix cache": {"prefix_cache": "off"},
    "reference": {"kernels": "reference"},
    "ngram": {"speculative": "ngram"},
    "self": {"speculative": "self"},
    "draft": {"speculative": "draft", "draft_model": LLAMA},
    "draft of 4 bits": {"speculative": "draft", "draft_model": "self-int4"},
    "offload": {"offload": "both"},
    "offload and radix": {"offload": "both", "prefix_cache": "radix", "offload_policy": "arc"},
}
TURNS = ("int4", "int8", "uint4", "fp8-channel", "nvfp4", "mxfp8", "mxfp4", "int8-g32")
MATRIX = [
    (technique, TURNS[(2 * i + turn) % len(TURNS)])
    for i, technique in enumerate(TECHNIQUES)
    for turn in range(2)
]


@pytest.mark.parametrize(("technique", "format_name"), MATRIX)
def test_every_technique_gives_the_tokens_of_the_rounded_model(
    technique: str, format_name: str, making: Callable[..., Any]
) -> None:
    engine = making(LLAMA, format_name, **TECHNIQUES[technique])
    Drive(engine, rounded_folder(LLAMA, format_name)).run(schedule(len(technique)))
    if technique == "draft of 4 bits":
        counts = engine.speculator.stats()
        assert counts["num_accepted_tokens"] > 0, counts


@pytest.mark.parametrize("format_name", ["int4", "fp8"])
def test_heads_of_other_sizes_and_a_tied_table(
    format_name: str, making: Callable[..., Any]
) -> None:
    Drive(making(QWEN3, format_name), rounded_folder(QWEN3, format_name)).run(schedule(3))


@pytest.mark.parametrize(
    ("model", "format_name", "flags"),
    [
        (LLAMA, "int4", {}),
        (LLAMA, "nvfp4", {"speculative": "ngram"}),
        (QWEN3, "int8", {"offload": "both"}),
        (MOE, "int4", {}),
        (MOE, "mxfp8", {"enable_expert_parallel": True}),
        (MOE, "uint4", {"enable_expert_parallel": True, "eplb": True, "eplb_interval": 5}),
    ],
)
def test_ranks_cut_what_was_rounded_whole(
    model: str, format_name: str, flags: dict[str, Any]
) -> None:
    options = {"quantization": format_name, **SMALL, **flags}
    engine, others = engine_in_threads(14, model, 2, **options)
    Drive(engine, rounded_folder(model, format_name)).run(schedule(5))
    engine.shutdown()
    assert not others.errors


def test_keys_and_values_travel_between_engines_of_a_rounded_model() -> None:
    options = {"quantization": "int4"}
    both = pair(options, options, part=14)
    Drive(both, rounded_folder(LLAMA, "int4")).run(
        [Event(i % 12, 24, None, None, i % 5) for i in range(14)]
    )
    both.settle()
    assert both.counts()["num_kv_fetched"] >= 4
    both.close()


def test_keys_and_values_of_other_weights_are_not_taken() -> None:
    both = pair({"quantization": "int4"}, {}, part=14)
    known = known_requests(LLAMA)[10]
    assert both.run(10) == known.output
    assert both.counts()["num_kv_failed"] == 1 and both.counts()["num_kv_fetched"] == 0
    both.settle()
    both.close()


def test_the_oracle_sees_one_wrong_format(making: Callable[..., Any]) -> None:
    with pytest.raises(AssertionError):
        Drive(making(LLAMA, "int8"), rounded_folder(LLAMA, "int4")).run(schedule(1))


# Keys and values, and inputs, of 8 bits: sums in another order may round another way, so tokens are equal
# almost always.


def tokens_of(engine: Any) -> list[list[int]]:
    known = known_requests(LLAMA)
    params = [k.cut(24, None)[0] for k in known]
    completions = engine.generate([k.prompt for k in known], params, progress=False)
    return [completion.token_ids for completion in completions]


def share_of_equal(some: list[list[int]], others: list[list[int]]) -> float:
    """Of all tokens, those before the first difference of their request."""
    equal = 0
    for one, other in zip(some, others, strict=True):
        differs = [a != b for a, b in zip(one, other, strict=True)]
        equal += differs.index(True) if True in differs else len(one)
    return equal / sum(map(len, some))


EIGHT_BITS = [
    {"kv_cache_dtype": "int8"},
    {"kv_cache_dtype": "fp8", "quantization": "int4"},
    {"quantization": "int8", "activations": "int8"},
    {"quantization": "int4", "activations": "int8", "kv_cache_dtype": "int8"},
    {"quantization": "fp8", "activations": "fp8"},
]
WITH_THEM: list[dict[str, Any]] = [
    {},
    {"speculative": "ngram"},
    {"speculative": "draft", "draft_model": "self-int4"},
    {"offload": "both", "prefix_cache": "radix"},
]


@cache
def alone(**flags: Any) -> list[list[int]]:
    """One request at a time, in the reference's operations."""
    options = {"num_blocks": 40, "block_size": 16, "max_num_seqs": 1, "kernels": "reference"}
    engine = make_engine(14, LLAMA, threads=1, **options, **flags)
    tokens = tokens_of(engine)
    engine.shutdown()
    return tokens


@pytest.mark.parametrize("more", WITH_THEM, ids=lambda flags: "-".join(map(str, flags.values())))
@pytest.mark.parametrize("flags", EIGHT_BITS, ids=lambda flags: "-".join(flags.values()))
def test_eight_bits_give_what_the_reference_gives(
    flags: dict[str, Any], more: dict[str, Any]
) -> None:
    engine = make_engine(14, LLAMA, threads=1, **SMALL, **flags, **more)
    tokens = tokens_of(engine)
    engine.check_integrity()
    engine.shutdown()
    assert share_of_equal(tokens, alone(**flags)) > 0.9
    assert tokens != alone(), "nothing was rounded"


def test_a_cache_of_eight_bits_travels_between_engines() -> None:
    options = {"kv_cache_dtype": "int8"}
    both = pair(options, options, part=14)
    outputs = [both.run(i) for i in range(8, 12)]
    both.settle()
    assert both.counts()["num_kv_fetched"] == 4
    both.close()
    assert share_of_equal(outputs, alone(**options)[8:]) > 0.9


# What is loaded, and what is refused.


def test_recipes() -> None:
    recipe = Recipe.of("int4", "auto", "int8")
    chosen = {
        "model.embed_tokens.weight": "int8-g32",
        "lm_head.weight": "int8-g32",
        "model.layers.11.self_attn.q_proj.weight": "int4",
        "model.layers.0.mlp.experts.7.down_proj.weight": "int4",
        "model.layers.0.mlp.gate.weight": None,
        "model.layers.0.input_layernorm.weight": None,
        "model.norm.weight": None,
    }
    assert {name: recipe.format_of(name) for name in chosen} == chosen
    assert Recipe.of("off", "auto", "off") == Recipe() and Recipe.of("off", "nf4", "off").embeddings
    assert Recipe.of("int4", "off", "off").embeddings is None
    assert copy_that_drafts("smollm2-135m") is None
    assert copy_that_drafts("self-int4") == recipe
    with pytest.raises(ValueError, match="draft_model is 'self-int5': self- and one of int8, "):
        copy_that_drafts("self-int5")


def test_weights_take_what_the_formula_says(making: Callable[..., Any]) -> None:
    engine = making(LLAMA, "int4")
    layers = 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 160)
    norms = 4 * 64 * 7
    assert engine.runner.num_weight_bytes == layers * 4.5 / 8 + 2 * 512 * 64 * 8.5 / 8 + norms


def test_keys_and_values_take_a_byte_each_and_a_scale() -> None:
    sizes = {}
    for name in ("auto", "int8", "fp8"):
        engine = make_engine(14, LLAMA, threads=1, kv_cache_memory=1 << 20, kv_cache_dtype=name)
        sizes[name] = engine.kv.num_blocks, engine.kv.num_bytes // engine.kv.num_blocks
        engine.shutdown()
    assert sizes["int8"] == sizes["fp8"] and sizes["int8"][1] / sizes["auto"][1] == 20 / 64
    assert sizes["int8"][0] == (1 << 20) // sizes["int8"][1]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quantization": "int5"}, "quantization must be one of off, int8, .* not 'int5'"),
        (
            {"quantization": "int4-g128"},
            "quantization is int4-g128: model.layers.0.* 64 inputs are no",
        ),
        ({"activations": "int8"}, "activations is int8: no weight is quantised, see quantization"),
        ({"kv_cache_dtype": "int4"}, "kv_cache_dtype must be one of auto, int8, fp8, not 'int4'"),
        (
            {"speculative": "draft", "draft_model": "self-int5"},
            "draft_model is 'self-int5': self- and one of int8, ",
        ),
    ],
)
def test_settings_that_cannot_be(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_engine(14, LLAMA, threads=1, **SMALL, **flags)


def test_a_checkpoint_with_nan_or_that_is_quantised_already_is_not_rounded(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shutil.copytree(rounded_folder(LLAMA, "int8"), tmp_path / "nan")
    tensors = load_file(tmp_path / "nan" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "nan" / "model.safetensors")
    with pytest.raises(ValueError, match=r"quantization is fp8: .*1\.mlp\.up_proj.weight has NaN"):
        make_engine(14, str(tmp_path / "nan"), threads=1, **SMALL, quantization="fp8")


def test_weights_that_are_too_large_for_a_format_are_named(tmp_path: Path) -> None:
    source = open_weights(resolve(LLAMA), quantized=True)
    name = "model.layers.0.mlp.up_proj.weight"
    large = source.readers[name]
    source.readers[name] = lambda part: large(part) * 1e9
    weights = QuantizedSource(source, resolve(LLAMA), Recipe.of("int4", "auto", "off"))
    with pytest.raises(ValueError, match=rf"quantization is int4: {name}: .* beyond float16"):
        weights.quantized(name, tuple(source.shapes[name]))


@cache
def quantised_folder() -> str:
    """A checkpoint that is quantised already, embedding and all."""
    folder, target = resolve(LLAMA), Path(tempfile.mkdtemp(prefix="quantised-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    source = open_weights(folder)

    def weights() -> Iterator[tuple[str, Any]]:
        for name in sorted(source.names):
            tensor = source.read(name, tuple(source.shapes[name]))
            yield name, FORMATS["int8"](tensor.float()) if tensor.dim() == 2 else tensor

    write_weights(target, weights())
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gguf", "file": "x.gguf"}
    (target / "config.json").write_text(json.dumps(config))
    (target / "tokenizer.json").write_text(TOKENIZER[0])
    return str(target)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"quantization": "int4"}, r"quantised already: .* to int4 \(quantization, or draft_model"),
        (
            {"speculative": "draft", "draft_model": "self-fp8"},
            r"quantised already: it cannot be rounded to fp8 \(quantization, or draft_model self-fp8",
        ),
        (
            {"quantize_embeddings": "nf4"},
            "quantize_embeddings is nf4: the checkpoint has lm_head.weight quantised already",
        ),
    ],
)
def test_what_is_quantised_already_is_not_rounded(
    flags: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = module_of(14, "model_runner")
    if "speculative" in flags:  # then the model itself would be loaded first
        monkeypatch.setattr(module.ModelRunner, "load_model", None)
    with pytest.raises(ValueError, match=message):
        make_engine(14, quantised_folder(), threads=1, **SMALL, **flags)


@pytest.mark.parametrize(
    ("model", "flags"),
    [
        (LLAMA, {"quantization": "int4"}),
        (LLAMA, {"quantization": "int8", "activations": "int8"}),
        (MOE, {"quantization": "int4"}),
        (MOE, {"quantization": "int8", "activations": "int8"}),
    ],
)
def test_sixteen_bits_on_a_cpu(model: str, flags: dict[str, Any]) -> None:
    engine = make_engine(14, model, threads=1, dtype="bfloat16", **SMALL, **flags)
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    [completion] = engine.generate([[5, 6, 7, 8, 9]], [params], progress=False)
    engine.shutdown()
    assert len(completion.token_ids) == 4


# Experts whose formats differ, as a checkpoint may have them.


def with_formats(monkeypatch: pytest.MonkeyPatch, chosen: Callable[[str], str | None]) -> None:
    monkeypatch.setattr(Recipe, "format_of", lambda self, name: chosen(name))


def test_experts_of_which_some_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    with_formats(monkeypatch, lambda name: "int4" if ".experts.0." in name else None)
    for kernels in ("cpu", "reference"):
        with pytest.raises(
            ValueError, match=r"layer 0: some experts are in plain .* others in int4"
        ):
            make_engine(14, MOE, threads=1, kernels=kernels, quantization="int4", **SMALL)


def test_experts_that_cannot_take_each_others_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank, and on two, each with one format of its own."""
    formats = {False: "int4", True: "int8"}
    with_formats(
        monkeypatch,
        lambda name: formats[".experts.0." in name] if ".experts." in name else None,
    )
    flags = {"quantization": "int4", "enable_expert_parallel": True, **SMALL}
    message = "eplb is on: layer 0 has experts of different formats"
    with pytest.raises(ValueError, match=message):
        make_engine(14, MOE, threads=1, eplb=True, **flags)
    make_engine(14, MOE, threads=1, **flags).shutdown()
    with_formats(
        monkeypatch,
        lambda name: (
            formats[int(name.split(".experts.")[1].split(".")[0]) < 4]
            if ".experts." in name
            else None
        ),
    )
    with pytest.raises(ValueError, match=message):
        engine_in_threads(14, MOE, 2, eplb=True, **flags)


def test_a_weight_that_cannot_be_cut_is_named() -> None:
    codes, order = torch.ones(8, 64, dtype=torch.int8), torch.arange(64).flip(0)
    weight = QuantizedWeight("int8", codes, torch.ones(8, 2), 32, order=order)
    source = SimpleNamespace(names={"x.weight"}, quantized=lambda name, shape: weight)
    own = Weights(source, torch.float32, None, SimpleNamespace(size=2, rank=0), None)
    message = "tensor_parallel_size is 2: x.weight: inputs 0 to 32 of a weight .* reordered"
    with pytest.raises(ValueError, match=message):
        own.matrix("x.weight", 8, Features(64, range(32)))


def test_ranks_know_each_other_by_the_format_of_a_copy_that_drafts() -> None:
    def prints(draft: str | None) -> dict[str, str]:
        return fingerprint({"model": LLAMA, "draft_model": draft})

    assert prints("self-int4") == prints(None) | {"draft_model": "self-int4"}
    assert "checkpoint of draft_model" in prints(QWEN3)
    with pytest.raises(ValueError, match="draft_model is 'self-int5'"):
        prints("self-int5")
