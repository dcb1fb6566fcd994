"""A quantised checkpoint from a plain one and some text: `python -m part14.calibrate --help`.

Layer by layer: run the text through the layer as it is and note what its products are given; scale and
round the products' weights by that; run the text through the rounded layer, so that the next one is
calibrated on the inputs that it will get. One layer, its H matrices and two activations of each token
are in memory.

The folder that is written is in the layout of compressed-tensors. This engine reads it, and so does vLLM.
"""

import argparse
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor
from tqdm import tqdm

from common.kernels.quantized import QuantizedWeight, pack_nibbles
from common.models.architecture import ModelConfig
from common.models.checkpoint import context_length, load_config, resolve
from common.models.errors import ModelError
from common.models.quantized_writer import QuantizedWriter
from common.models.tokenizer import Tokenizer
from common.models.weight_slices import WeightSource, open_weights
from common.texts import CALIBRATION, sections

from .gptq import fit_scales, gptq, round_to
from .observe import Tensors, TextInLayers
from .quantization import FORMATS
from .scaling import Inputs, awq_scales, smooth_scales

# Projections that share their inputs, and what made these: 1 / s of a scaled input goes there.
PRODUCTS = (
    (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "input_layernorm"),
    (("self_attn.o_proj",), "self_attn.v_proj"),
    (("mlp.gate_proj", "mlp.up_proj"), "post_attention_layernorm"),
    (("mlp.down_proj",), "mlp.up_proj"),
)
CALIBRATED = ("int4", "int4-g64", "int4-g128", "int8")  # names of formats
MOST_THREADS = 1024  # as of an engine
METHODS = ("round", "awq", "gptq", "awq+gptq", "smoothquant", "smoothquant+gptq")


@dataclass(frozen=True)
class Plan:
    """What a weight is rounded to, and how."""

    format: str
    method: str

    @property
    def limits(self) -> tuple[int, int]:
        return (-127, 127) if self.format == "int8" else (-8, 7)

    def plain(self, weight: Tensor) -> Tensor:
        """What rounding alone makes of a weight, [out, in]."""
        return FORMATS[self.format](weight).dequantize()

    def round(self, weight: Tensor, inputs: Inputs) -> QuantizedWeight:
        """A weight [out, in] in the format. Raises ValueError where its groups do not divide it, and
        where numbers are too large."""
        if not inputs.hessian.isfinite().all():
            raise ValueError("what it is given is too large: X^T X is not finite")
        rounded = self.rounded(weight, inputs)
        if not rounded.scales.isfinite().all():
            largest, dtype = weight.abs().max().item(), str(rounded.scales.dtype)
            dtype = dtype.removeprefix("torch.")
            raise ValueError(f"weights up to {largest:.3g} have scales beyond {dtype}")
        return rounded

    def rounded(self, weight: Tensor, inputs: Inputs) -> QuantizedWeight:
        plain = FORMATS[self.format](weight)
        is_int8, scales, group = self.format == "int8", plain.scales.float(), plain.group
        if self.method == "round":
            return replace(plain, activations="int8" if is_int8 else None)
        if not is_int8:
            scales = fit_scales(weight, inputs.hessian.diagonal(), group, self.limits)
        if "gptq" in self.method:
            codes = gptq(weight, inputs.hessian, scales, group, self.limits)
        else:
            codes = round_to(weight, scales.repeat_interleave(group, dim=1), self.limits)
        if is_int8:
            return QuantizedWeight("int8", codes.to(torch.int8), scales, group, activations="int8")
        return QuantizedWeight("int4", pack_nibbles(codes + 8), scales.half(), group)


def scale_layer(
    tensors: Tensors, inputs: list[Inputs], plan: Plan, shape: ModelConfig
) -> list[Inputs]:
    """Scale a layer's weights in place, without a change of what it computes; the inputs after that."""
    queries = shape.num_heads // shape.num_kv_heads
    scaled = list(inputs)
    for i, (names, maker) in enumerate(PRODUCTS):
        weight = torch.cat([tensors[f"{name}.weight"] for name in names])
        is_norm = maker.endswith("norm")
        if plan.method.startswith("awq"):
            shared = (shape.num_kv_heads, queries, shape.head_dim)
            scales = awq_scales(
                weight,
                inputs[i],
                plan.plain,
                shared if maker.endswith("v_proj") else None,
            )
        elif plan.method.startswith("smoothquant") and is_norm:
            scales = smooth_scales(weight, inputs[i])
        else:
            continue
        scaled[i] = inputs[i].divided(scales)
        for name in names:
            tensors[f"{name}.weight"] = tensors[f"{name}.weight"] * scales
        if maker.endswith("v_proj"):  # a row for each KV head
            scales = scales.view(shape.num_kv_heads, queries, -1)[:, 0].flatten()
        for kind in ("weight", "bias"):
            name = f"{maker}.{kind}"
            if name in tensors:
                own = scales if tensors[name].dim() == 1 else scales.unsqueeze(1)
                tensors[name] = tensors[name] / own
    return scaled


def quantize_layer(
    number: int, tensors: Tensors, inputs: list[Inputs], plan: Plan, shape: ModelConfig
) -> Tensors:
    """A layer's tensors with the weights of its products rounded. Raises ValueError."""
    tensors = dict(tensors)
    inputs = scale_layer(tensors, inputs, plan, shape)
    for (names, _), seen in zip(PRODUCTS, inputs, strict=True):
        weights = [tensors[f"{name}.weight"] for name in names]  # of one input: rounded together
        try:
            rounded = plan.round(torch.cat(weights), seen)
        except ValueError as error:
            name = f"model.layers.{number}.{names[0]}"
            raise ValueError(f"format is {plan.format}: {name}: {error}") from None
        begin = 0
        for name, weight in zip(names, weights, strict=True):
            tensors[f"{name}.weight"] = rounded.rows(slice(begin, begin + len(weight)))
            begin += len(weight)
    return tensors


def layer_tensors(source: WeightSource, number: int) -> Tensors:
    """A layer's tensors in float32, by their names in it. Raises ModelError."""
    prefix = f"model.layers.{number}."
    names = sorted(name for name in source.names if name.startswith(prefix))
    found = {name: source.read(name, tuple(source.shapes[name])).float() for name in names}
    for name, tensor in found.items():
        if not bool(tensor.isfinite().all()):
            raise ModelError(f"the checkpoint's {name} has NaN or infinity")
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


@torch.inference_mode()
def calibrated(
    folder: Path, token_ids: Tensor, plan: Plan, progress: bool = False
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Every tensor of a model by its name, those of its layers' products quantised.

    token_ids: [sequences, length] int64. Raises ValueError.
    """
    source = open_weights(folder)
    config = load_config(folder)
    shape = ModelConfig.from_transformers(config, context_length(config), moe=True)
    if shape.num_experts:
        raise ModelError(f"{folder} has experts: only dense models are calibrated")

    def others(name: str) -> Tensor:
        return source.read(name, tuple(source.shapes[name]))

    text = TextInLayers(shape, token_ids, others("model.embed_tokens.weight"))
    for name in sorted(source.names):
        if not name.startswith("model.layers."):
            yield name, others(name)
    for number in tqdm(range(shape.num_layers), "Layers", disable=None if progress else True):
        tensors = layer_tensors(source, number)
        rounded = quantize_layer(number, tensors, text.observe(number, tensors), plan, shape)
        text.advance(number, rounded)
        for name, tensor in rounded.items():
            yield f"model.layers.{number}.{name}", tensor


def text_tokens(folder: Path, path: Path, num_tokens: int, length: int) -> Tensor:
    """Token ids of a text's sections in turn, [sequences, length] int64. Raises ValueError."""
    tokenizer = Tokenizer.load(folder)
    if tokenizer is None:
        raise ModelError(f"{folder} has no tokenizer: its weights are random")
    pieces = [
        torch.tensor(tokenizer.encode(text)).split(length) for text in sections(path).values()
    ]
    turns = [piece[i] for i in range(max(map(len, pieces))) for piece in pieces if i < len(piece)]
    whole = [piece for piece in turns if len(piece) == length][: -(-num_tokens // length)]
    if not whole:
        raise ValueError(f"text {path} is shorter than {length} tokens")
    return torch.stack(whole)


def build_parser() -> argparse.ArgumentParser:
    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.exit(2, f"{self.prog}: error: {message}\n")

    module = (__package__ or "").partition(".")[0]
    parser = Parser(f"python -m {module}.calibrate", description=__doc__, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--model", default="smollm2-135m", help="named as a server's (%(default)s)")
    parser.add_argument("--method", choices=METHODS, default="awq+gptq", help="(%(default)s)")
    parser.add_argument("--format", choices=CALIBRATED, default="int4", help="(%(default)s)")
    parser.add_argument("--text", type=Path, default=CALIBRATION, help="UTF-8 (the shipped one)")
    parser.add_argument("--tokens", type=int, default=8192, help="of the text (%(default)s)")
    parser.add_argument("--length", type=int, default=256, help="of a sequence (%(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (torch's own)")
    parser.add_argument("--output", type=Path, required=True, help="the folder to be made")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    begin = time.perf_counter()
    try:
        for name, low in (("tokens", 1), ("length", 2), ("threads", 1)):
            value = getattr(args, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}: at least {low}")
        if args.threads is not None and args.threads > MOST_THREADS:
            raise ValueError(f"threads is {args.threads}: at most {MOST_THREADS}")
        if args.threads:
            torch.set_num_threads(args.threads)
        write(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = time.perf_counter() - begin
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(f"{args.output}: {seconds:.0f} s, at most {peak:.0f} MiB of memory")
    return 0


def write(args: argparse.Namespace) -> None:
    """Raises ValueError."""
    folder = resolve(args.model)
    with QuantizedWriter(folder, args.output) as writer:
        token_ids = text_tokens(folder, args.text, args.tokens, args.length)
        plan = Plan(args.format, args.method)
        for name, tensor in calibrated(folder, token_ids, plan, progress=True):
            writer.write(name, tensor)


if __name__ == "__main__":
    sys.exit(main())
