"""The weights of experts under one set of names, whatever a checkpoint calls them.

Qwen3-MoE's own names are the ones that are used here: `mlp.experts.N.gate_proj.weight`, `up_proj`,
`down_proj`, and `mlp.gate.weight` for the router. Mixtral's files say `block_sparse_moe` and w1, w3,
w2. transformers 5 keeps the experts of a layer in two tensors, `mlp.experts.gate_up_proj`
[experts, 2 * size, hidden] and `mlp.experts.down_proj` [experts, hidden, size]; its models have
these, and files may.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from common.models.errors import ModelError
from common.models.weight_files import Header

MIXTRAL = re.compile(r"(layers\.\d+)\.block_sparse_moe\.(gate|experts\.\d+\.w[123])\.weight$")
PROJECTIONS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
MOST_EXPERTS = 1 << 16  # of a layer
FUSED = re.compile(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)$")


def plain_name(name: str) -> str:
    """A tensor's name with Mixtral's words replaced."""
    match = MIXTRAL.search(name)
    if match is None:
        return name
    place, last = match[2], match[2][-2:]
    if last in PROJECTIONS:
        place = place[:-2] + PROJECTIONS[last]
    return f"{name[: match.start()]}{match[1]}.mlp.{place}.weight"


def pieces(name: str, shape: tuple[int, ...]) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """(name, index) of each expert's weight in a tensor that holds a layer's; none in another.

    Raises ModelError for a shape that no layer has: one without bytes could say any number.
    """
    match = FUSED.match(name)
    if match is None or len(shape) != 3:
        return
    if 0 in shape or shape[0] > MOST_EXPERTS:
        raise ModelError(
            f"{name:.120} is {list(shape)}; expected up to {MOST_EXPERTS} experts, and none empty"
        )
    prefix, half = match[1], shape[1] // 2
    for expert in range(shape[0]):
        if match[2] == "down_proj":
            yield f"{prefix}.{expert}.down_proj.weight", (expert,)
        elif shape[1] % 2 == 0:
            yield f"{prefix}.{expert}.gate_proj.weight", (expert, slice(None, half))
            yield f"{prefix}.{expert}.up_proj.weight", (expert, slice(half, None))


def split_experts(headers: dict[str, Header]) -> dict[str, Header]:
    """The same tensors, each expert's by itself. Which is which follows from names and shapes; no
    file is read."""
    found: dict[str, Header] = {}
    for name, header in headers.items():
        parts = dict(pieces(name, header.shape))
        for part, index in parts.items():
            shape = torch.empty(header.shape, device="meta")[index].shape
            found[part] = replace(header, shape=tuple(shape), source=name, index=index)
        if not parts:
            found[plain_name(name)] = replace(header, source=header.source or name)
    return found


def split_shapes(shapes: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a model of transformers', each expert's by itself."""
    found = {}
    for name, tensor in shapes.items():
        parts = {part: tuple(tensor[index].shape) for part, index in pieces(name, tensor.shape)}
        found |= parts or {plain_name(name): tuple(tensor.shape)}
    return found


def fused_experts(
    tensors: dict[str, torch.Tensor], shapes: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors under the names of a model of transformers', the reverse of `split_shapes`.

    shapes: the model's state without memory. Weights of experts are taken out of `tensors`.
    """
    for name, whole in shapes.items():
        parts = dict(pieces(name, whole.shape))
        if parts and parts.keys() <= tensors.keys():
            first = tensors[next(iter(parts))]
            fused = torch.empty(whole.shape, dtype=first.dtype, device=first.device)
            for part, index in parts.items():
                fused[index] = tensors.pop(part)
            tensors[name] = fused
        elif plain_name(name) in tensors:
            tensors[name] = tensors.pop(plain_name(name))
    return tensors
