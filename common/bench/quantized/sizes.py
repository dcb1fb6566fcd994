"""How many bytes a weight takes in each format, by arithmetic: what a loaded model is held against."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class Layout:
    """Bits of a code; of what a group of `group` numbers shares (None: a row); of what a row has."""

    code: int
    group: int | None
    shared: int
    row: int = 0

    def num_bytes(self, out_features: int, in_features: int) -> float:
        groups = 1 if self.group is None else in_features / self.group
        return out_features * (in_features * self.code + groups * self.shared + self.row) / 8


LAYOUTS = {
    "int8": Layout(8, None, 32),
    "int8-g32": Layout(8, 32, 16),
    "int4": Layout(4, 32, 16),
    "int4-g64": Layout(4, 64, 16),
    "int4-g128": Layout(4, 128, 16),
    "uint4": Layout(4, 32, 16 + 16),  # a scale and a minimum
    "fp8": Layout(8, None, 32),  # one scale, kept for each row, as those of channels are
    "fp8-channel": Layout(8, None, 32),
    "fp8-block": Layout(8, 128, 32),
    "mxfp8": Layout(8, 32, 8),
    "mxfp4": Layout(4, 32, 8),
    "nvfp4": Layout(4, 16, 8, 32),
    "nf4": Layout(4, 64, 32),  # in files of bitsandbytes: 8 bits, and a 256th of 32
}


def checkpoint_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of each tensor of a checkpoint. Raises ValueError."""
    import torch

    from common.models.checkpoint import resolve
    from common.models.weight_slices import open_weights

    source = open_weights(resolve(model), torch.device("cpu"))
    return {name: tuple(source.shapes[name]) for name in sorted(source.names)}


def formats_of(settings: Mapping[str, Any]) -> tuple[str, str]:
    """(of the layers' matrices, of embedding and head), "off" where they are not quantised."""
    layers = settings.get("quantization", "off")
    embeddings = settings.get("quantize_embeddings", "auto")
    if embeddings == "auto":
        embeddings = "off" if layers == "off" else "int8-g32"
    return layers, embeddings


def tensor_bytes(
    name: str, shape: tuple[int, ...], formats: tuple[str, str], dtype_bytes: int
) -> float:
    layers, embeddings = formats
    is_projection = name.startswith("model.layers.") and name.endswith("_proj.weight")
    chosen = embeddings if name in EMBEDDINGS else layers if is_projection else "off"
    if chosen == "off":
        return prod(shape) * dtype_bytes
    return LAYOUTS[chosen].num_bytes(*shape)


def model_bytes(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], dtype_bytes: int = 4
) -> float:
    """Bytes of all weights of a dense model when these fields of its EngineConfig quantise it."""
    formats = formats_of(settings)
    return sum(tensor_bytes(name, shape, formats, dtype_bytes) for name, shape in shapes.items())


def looked_up_bytes(
    shapes: Mapping[str, tuple[int, ...]], settings: Mapping[str, Any], dtype_bytes: int = 4
) -> float:
    """Bytes of an embedding that is no head as well: a step reads some rows of it, not all."""
    embedding, head = EMBEDDINGS
    if head not in shapes:
        return 0
    return tensor_bytes(embedding, shapes[embedding], formats_of(settings), dtype_bytes)
