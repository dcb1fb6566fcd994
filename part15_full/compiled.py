"""torch.compile in place of our own small kernels, or over whole layers.

`ops`: norms and activation are compiled from their reference operations; matrix products and attention
stay as they are.
`layers`: a layer is two pieces with attention between them. Each piece is compiled as a whole, so that
norms and activation may be fused with the products before and after them. Shapes are dynamic: one
compiled piece serves every layer, in a version for a single token and one for any other number.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.kernels import Ops
from common.kernels.reference import ReferenceOps

from .config import EngineConfig
from .model import MLP, CausalLM, Context, DecoderLayer

OPERATIONS = ("rms_norm", "add_rms_norm", "silu_and_mul")
COMPILERS = {"cpu": ("CXX", "g++", "c++", "clang++"), "cuda": ("CC", "gcc", "cc", "clang")}
REFERENCE = ReferenceOps()


def check_compiler(config: EngineConfig, device: torch.device) -> None:
    """Raises ValueError where `compile` is asked for and there is no compiler."""
    variable, *names = COMPILERS[device.type]
    found = os.environ.get(variable, ""), *map(shutil.which, names)
    if config.compile != "off" and not any(found):
        language = "C++" if device.type == "cpu" else "C"
        raise ValueError(
            f"compile is {config.compile}: it needs a {language} compiler, and none of"
            f" {', '.join(names)} is here"
        )


def compile_operations(ops: Ops) -> None:
    """Replace the norms and the activation of `ops` by compiled ones."""
    for name in OPERATIONS:
        setattr(ops, name, torch.compile(getattr(REFERENCE, name), dynamic=True))


def compile_layers(model: CausalLM) -> None:
    """Replace a model's layers by compiled ones. Raises ValueError for layers that cannot be compiled."""
    for number, layer in enumerate(model.layers):
        weights = []
        if isinstance(layer.mlp, MLP):
            weights = [layer.attention.qkv, layer.attention.out, layer.mlp.gate_up, layer.mlp.down]
        if not weights or model.group.size > 1:
            raise ValueError("compile is layers: it is for dense models on one rank")
        if not all(isinstance(w, tuple) and isinstance(w[0], Tensor) for w in weights):
            raise ValueError(
                f"compile is layers: weights must be plain tensors, which kernels {model.ops.name}"
                " and quantization do not keep"
            )
        model.layers[number] = CompiledLayer(layer)


def before_attention(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, qkv: tuple[Tensor, Tensor | None]
) -> Tensor:
    return F.linear(REFERENCE.add_rms_norm(x, residual, norm, eps), *qkv)


def after_attention(
    x: Tensor, residual: Tensor, norm: Tensor, eps: float, weights: list[tuple[Tensor, Any]]
) -> Tensor:
    """weights: (weight, bias) of attention's output, of gate and up, of down."""
    out, gate_up, down = weights
    x = REFERENCE.add_rms_norm(F.linear(x, *out), residual, norm, eps)
    return F.linear(REFERENCE.silu_and_mul(F.linear(x, *gate_up)), *down)


@cache
def compiled(piece: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """One of the two, compiled. (Not where it is defined: that alone loads the compiler, for 3 s.)"""
    return torch.compile(piece, dynamic=True)


@dataclass
class CompiledLayer:
    """A decoder layer of a dense model, in compiled pieces; it is called like `DecoderLayer`."""

    layer: DecoderLayer

    @property
    def mlp(self) -> MLP:
        return self.layer.mlp

    def __call__(self, x: Tensor, residual: Tensor, context: Context) -> Tensor:
        layer, attention = self.layer, self.layer.attention
        qkv = compiled(before_attention)(x, residual, layer.input_norm, layer.eps, attention.qkv)
        x = attention.attend(qkv, context)
        weights = [attention.out, layer.mlp.gate_up, layer.mlp.down]
        after = compiled(after_attention)
        return after(x, residual, layer.post_attention_norm, layer.eps, weights)
