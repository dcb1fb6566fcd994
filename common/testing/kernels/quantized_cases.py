"""Quantised weights of every kind and odd size, and how far a product of them may be off."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from common.kernels import Ops
from common.kernels.quantized import BYTES, KINDS, QuantizedWeight, round_activations
from common.kernels.reference import ReferenceOps

TOLERANCES = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass(frozen=True)
class Spec:
    """A weight: its kind, sizes, group, and what else it has."""

    kind: str
    out_features: int
    in_features: int
    group: int
    scales: torch.dtype = torch.float16
    minimums: torch.dtype | None = None
    has_row_scales: bool = False
    has_order: bool = False
    activations: str | None = None

    @property
    def name(self) -> str:
        parts = [self.kind, f"{self.out_features} x {self.in_features}", f"groups of {self.group}"]
        parts += [str(self.scales).removeprefix("torch.")]
        parts += ["minimums"] * (self.minimums is not None) + ["rows"] * self.has_row_scales
        parts += ["order"] * self.has_order + [f"{self.activations} inputs"] * bool(
            self.activations
        )
        return ", ".join(parts)


# What formats are made of, for a weight of any size; a group of 0 is the whole depth.
FORMATS = {
    "int8": Spec("int8", 0, 0, 0, torch.float32),
    "int8-g32": Spec("int8", 0, 0, 32),
    "int4-g32": Spec("int4", 0, 0, 32),
    "int4-g128": Spec("int4", 0, 0, 128),
    "int4-g128 with minimums": Spec("uint4", 0, 0, 128, minimums=torch.float16),
    "fp8": Spec("fp8_e4m3", 0, 0, 0, torch.float32),
    "fp8-block": Spec("fp8_e4m3", 0, 0, 128, torch.float32),
    "mxfp8": Spec("fp8_e4m3", 0, 0, 32, torch.float8_e8m0fnu),
    "mxfp4": Spec("fp4_e2m1", 0, 0, 32, torch.float8_e8m0fnu),
    "nvfp4": Spec("fp4_e2m1", 0, 0, 16, torch.float8_e4m3fn, has_row_scales=True),
    "nf4": Spec("nf4", 0, 0, 64, torch.float32),
    "int8, int8 inputs": Spec("int8", 0, 0, 0, torch.float32, activations="int8"),
    "int4-g32, int8 inputs": Spec("int4", 0, 0, 32, activations="int8"),
    "fp8, fp8 inputs": Spec("fp8_e4m3", 0, 0, 0, torch.float32, activations="fp8"),
}


def make_weight(spec: Spec, seed: int = 0, device: torch.device | str = "cpu") -> QuantizedWeight:
    """Codes of all values, scales of several sizes."""
    generator = torch.Generator().manual_seed(seed)
    outs, ins, groups = spec.out_features, spec.in_features, spec.in_features // spec.group

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    if spec.kind == "fp8_e4m3":
        codes = (torch.randn(outs, ins, generator=generator) * 60).to(torch.float8_e4m3fn)
    else:
        width = ins if spec.kind in BYTES else ins // 2
        codes = torch.randint(0, 256, (outs, width), dtype=torch.uint8, generator=generator)
        codes = codes.view(BYTES.get(spec.kind, torch.uint8))
    minimums = None if spec.minimums is None else (rand(outs, groups) - 0.5).to(spec.minimums)
    tensors: dict[str, Any] = {
        "codes": codes,
        "scales": (rand(outs, groups) * 0.05 + 0.002).to(spec.scales),
        "minimums": minimums,
        "row_scales": rand(outs) + 0.5 if spec.has_row_scales else None,
        "order": torch.randperm(ins, generator=generator) if spec.has_order else None,
    }
    placed = {name: x if x is None else x.to(device) for name, x in tensors.items()}
    return QuantizedWeight(kind=spec.kind, group=spec.group, activations=spec.activations, **placed)


def expected(x: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
    """In float64, with inputs rounded in float32 where they are."""
    if weight.activations is None:
        inputs = x.double()
    else:
        order = torch.arange(x.shape[1]) if weight.order is None else weight.order.cpu()
        rounded = round_activations(x.float()[:, order], weight.activations, weight.group)
        inputs = rounded.double()[:, order.argsort()]
    product = inputs @ weight.dequantize().double().T
    return product if bias is None else product + bias.double()


def off_by(found: Tensor, wanted: Tensor) -> float:
    """The largest difference, as a share of the largest number."""
    return float((found.double().cpu() - wanted.cpu()).abs().max() / wanted.abs().max())


def linear_error(
    ops: Ops,
    spec: Spec,
    num_tokens: int,
    dtype: torch.dtype,
    device: Any = "cpu",
    bias: bool = True,
) -> float:
    generator = torch.Generator().manual_seed(num_tokens)
    x = torch.randn(num_tokens, spec.in_features, generator=generator).to(dtype)
    own_bias = torch.randn(spec.out_features, generator=generator).to(dtype) if bias else None
    weight = make_weight(spec)
    placed = None if own_bias is None else own_bias.to(device)
    prepared = ops.prepare_weight(make_weight(spec, device=device), placed)
    return off_by(ops.linear(x.to(device), prepared), expected(x, weight, own_bias))


def linear_specs() -> Iterator[tuple[Spec, int]]:
    """Weights with the tokens that they are multiplied by: every kind as formats have it, and each
    option once; sizes that are no multiples of tiles."""
    for kind in KINDS:
        yield Spec(kind, 70, 96, 96, torch.float32), 1
    yield Spec("int8", 130, 1024, 1024, torch.float32), 3  # the depth is split
    yield Spec("int8", 70, 128, 32), 17
    yield Spec("int4", 70, 160, 32), 3
    yield Spec("int4", 20, 1024, 128), 2
    yield Spec("uint4", 70, 384, 128, minimums=torch.float16), 3
    yield Spec("uint4", 40, 96, 96, minimums=torch.float32, has_order=True), 3
    yield Spec("fp8_e4m3", 70, 256, 128, torch.float32), 3
    yield Spec("fp8_e4m3", 70, 96, 32, torch.float8_e8m0fnu), 3
    yield Spec("fp4_e2m1", 70, 96, 32, torch.float8_e8m0fnu), 3
    yield Spec("fp4_e2m1", 70, 96, 16, torch.float8_e4m3fn, has_row_scales=True), 3
    yield Spec("nf4", 70, 128, 64, torch.float32), 3
    yield Spec("nf4", 20, 96, 48, torch.bfloat16), 3  # a group that is no power of two
    yield Spec("int4", 20, 40, 20), 3  # too odd for the kernels
    yield Spec("int8", 70, 104, 104, torch.float32), 3  # inputs that are no multiple of 16
    yield Spec("int8", 70, 160, 160, torch.float32, activations="int8"), 17
    yield Spec("int8", 70, 160, 32, activations="int8"), 3
    yield Spec("int4", 70, 160, 32, has_order=True, activations="int8"), 3
    yield Spec("uint4", 70, 128, 64, minimums=torch.float16, activations="int8"), 3
    yield Spec("fp4_e2m1", 40, 96, 16, torch.float8_e4m3fn, None, True, activations="int8"), 3
    yield Spec("fp8_e4m3", 70, 160, 160, torch.float32, activations="fp8"), 3
    yield Spec("fp8_e4m3", 48, 256, 128, torch.float32, activations="fp8"), 3


def expert_specs() -> Iterator[tuple[Spec, Spec]]:
    """gate_up and down."""
    for kind, group, activations in (("int4", 32, None), ("int8", 0, "int8")):
        up, down = (
            Spec(kind, *shape, group or shape[1], torch.float32, activations=activations)
            for shape in ((64, 96), (96, 32))
        )
        yield up, down


def experts_error(
    ops: Ops, specs: tuple[Spec, Spec], num_tokens: int, dtype: torch.dtype, device: Any = "cpu"
) -> float:
    """Three experts, of which one is replaced; two for each token, some absent."""
    generator = torch.Generator().manual_seed(7)
    up, down = ([make_weight(spec, seed, device) for seed in range(4)] for spec in specs)
    x = torch.randn(num_tokens, specs[0].in_features, generator=generator).to(dtype)
    ids = torch.rand(num_tokens, 3, generator=generator).topk(2).indices
    ids[0, 0] = -1
    weights = torch.rand(num_tokens, 2, generator=generator)
    prepared = ops.prepare_experts(iter(up[:3]), iter(down[:3]))
    ops.replace_expert(prepared, 1, up[3], down[3])
    found = ops.experts(x.to(device), ids.to(device), weights.to(device), prepared)
    own = ([make_weight(spec, seed) for seed in (0, 3, 2)] for spec in specs)
    wide = x.float() if specs[0].activations else x.double()
    return off_by(found, ReferenceOps().experts(wide, ids, weights, tuple(own)).double())
