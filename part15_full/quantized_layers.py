"""Which weights are quantised, and to what: by a recipe when they are loaded, or by the checkpoint.

A recipe names formats. Norms and routers have none: they are a thousandth of the bytes, and a router's
rounded score may choose another expert. The embedding, which is often the head as well, has a switch
of its own: what it loses shows in every token.

A weight is quantised whole and then cut for the ranks, so that its scales, and what the model says,
do not depend on how many ranks there are. With `activations` they do: where ranks divide a product's
inputs, each rounds its own by themselves.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from common.kernels.quantized import QuantizedWeight, can_join, join
from common.kernels.quantized_support import emulation
from common.models.checkpoint import is_random
from common.models.quantized_cache import cached_weights
from common.models.weight_slices import Part, WeightSource

from .quantization import FORMATS

EMBEDDINGS = ("model.embed_tokens.weight", "lm_head.weight")
LAYERS = re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\..*_proj\.weight")
WORTH_KEEPING = 64 << 20  # bytes of weights that are quantised once and kept, not at each start
VERSION = 1  # of what is kept; the number changes when a format's rounding does


@dataclass(frozen=True)
class Recipe:
    """What weights are rounded to: names of formats, or None for as they are in the checkpoint."""

    layers: str | None = None
    embeddings: str | None = None
    activations: str | None = None  # what a product's inputs are rounded to: int8 or fp8
    insists: bool = False  # an embedding that the checkpoint has quantised is an error

    @classmethod
    def of(cls, quantization: str, embeddings: str, activations: str) -> "Recipe":
        """From an engine's settings. The embedding follows the layers: to INT8, in groups of 32."""
        layers = None if quantization == "off" else quantization
        chosen = {"auto": "int8-g32" if layers else None, "off": None}.get(embeddings, embeddings)
        insists = embeddings not in ("auto", "off")
        return cls(layers, chosen, None if activations == "off" else activations, insists)

    def format_of(self, name: str) -> str | None:
        """The format of a weight by its name in the checkpoint."""
        if name in EMBEDDINGS:
            return self.embeddings
        return self.layers if LAYERS.fullmatch(name) else None

    def names(self, source: WeightSource) -> list[str]:
        """The weights of a checkpoint that are rounded. Raises ValueError where some are already."""
        return [name for name in sorted(source.names) if self.rounds(name, source)]

    def rounds(self, name: str, source: WeightSource) -> bool:
        """Raises ValueError."""
        if self.format_of(name) is None or not source.is_quantized(name):
            return self.format_of(name) is not None
        if name in EMBEDDINGS and not self.insists:
            return False
        if name in EMBEDDINGS:
            given = f"quantize_embeddings is {self.embeddings}"
            raise ValueError(f"{given}: the checkpoint has {name} quantised already")
        raise ValueError(
            f"the checkpoint is quantised already: it cannot be rounded to {self.layers}"
            f" (quantization, or draft_model self-{self.layers})"
        )

    def __str__(self) -> str:
        return f"{self.layers},{self.embeddings},{VERSION}"


class QuantizedSource:
    """A checkpoint's weights by name, quantised as it has them, or as a recipe says."""

    def __init__(self, source: WeightSource, folder: Path, recipe: Recipe) -> None:
        """Raises ValueError where the recipe does not fit the checkpoint."""
        self.source, self.recipe, self.names = source, recipe, source.names
        chosen = {name: source.shapes[name] for name in recipe.names(source)}
        if recipe.activations and not (chosen or any(map(source.is_quantized, self.names))):
            text = f"activations is {recipe.activations}: no weight is quantised, see quantization"
            raise ValueError(text)
        num_bytes = 4 * sum(torch.Size(shape).numel() for shape in chosen.values())
        self.formats: set[tuple[str, str]] = set()  # kinds of codes, and of inputs, that were read
        self.kept: dict[str, QuantizedWeight] = {}
        if num_bytes >= WORTH_KEEPING and not is_random(folder):

            def build() -> Iterator[tuple[str, QuantizedWeight]]:
                return ((name, self.quantize(name, tuple(chosen[name]))) for name in chosen)

            self.kept = dict(cached_weights(folder, str(recipe), build))

    def read(self, name: str, shape: tuple[int, ...], part: Part = ()) -> torch.Tensor:
        """A weight that is not quantised, or the part of it. Raises ModelError."""
        return self.source.read(name, shape, part)

    def quantized(self, name: str, shape: tuple[int, int]) -> QuantizedWeight | None:
        """A whole weight; None where it is not quantised. Raises ModelError and ValueError."""
        weight = self.source.quantized(name, shape)
        if weight is None and self.recipe.rounds(name, self.source):
            weight = self.kept.get(name) or self.quantize(name, shape)
            if weight.shape != shape:
                self.source.read(name, shape)  # says so
        if weight is None:
            return None
        weight = replace(weight, activations=self.recipe.activations or weight.activations)
        self.formats.add((weight.kind, weight.activations or ""))
        return weight

    def report(self, device: torch.device) -> None:
        """Say on stderr what is not done as its format's name promises."""
        for kind, activations in sorted(self.formats):
            how = emulation(kind, activations or None, device)
            if how is not None:
                with_ = f" with {activations} inputs" if activations else ""
                print(f"Quantization: {kind}{with_} is emulated: {how}", file=sys.stderr)
        for note in self.source.notes:
            print(f"Quantization: {note}", file=sys.stderr)

    def quantize(self, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
        """Round a weight of the checkpoint as the recipe says. Raises ValueError."""
        format_name = self.recipe.format_of(name)
        weight = self.source.read(name, shape).float()
        if not bool(weight.isfinite().all()):
            raise ValueError(f"quantization is {format_name}: {name} has NaN or infinity")
        try:
            rounded = FORMATS[format_name](weight)
        except ValueError as error:
            raise ValueError(f"quantization is {format_name}: {name}: {error}") from None
        if not bool(rounded.scales.float().isfinite().all()):
            largest, dtype = (
                weight.abs().max().item(),
                str(rounded.scales.dtype).removeprefix("torch."),
            )
            problem = f"weights up to {largest:.3g} have scales beyond {dtype}"
            raise ValueError(f"quantization is {format_name}: {name}: {problem}")
        return rounded


def side_by_side(
    weights: Sequence[torch.Tensor | QuantizedWeight], dtype: torch.dtype
) -> torch.Tensor | QuantizedWeight:
    """Projections of one input as one weight, output after output. Those of different formats (a
    checkpoint may leave one out) can be one only in plain numbers."""
    quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
    if len(quantized) == len(weights) and can_join(quantized):
        return join(quantized)
    plain = [w.dequantize().to(dtype) if isinstance(w, QuantizedWeight) else w for w in weights]
    return torch.cat(plain) if len(plain) > 1 else plain[0]


def format_of(weight: torch.Tensor | QuantizedWeight) -> tuple[object, ...]:
    """What two weights must have in common for one to take the other's place; first its kind."""
    if isinstance(weight, torch.Tensor):
        return ("plain", weight.dtype)
    dtypes = {name: tensor.dtype for name, tensor in weight.tensors.items()}
    return weight.kind, weight.group, weight.activations, *dtypes.items()


def copy_that_drafts(draft_model: str) -> Recipe | None:
    """`self-FORMAT`: the model itself, in that format, drafts for the model; None: another does.
    Its embedding is INT8, and on integers its products' inputs are, too: a draft may be wrong.

    Raises ValueError.
    """
    name = draft_model.removeprefix("self-")
    if name == draft_model:
        return None
    if name not in FORMATS:
        raise ValueError(f"draft_model is {draft_model!r}: self- and one of {', '.join(FORMATS)}")
    return Recipe.of(name, "auto", "int8" if name.startswith(("int", "uint")) else "off")


def kv_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """What keys and values are kept as: the model's dtype for auto."""
    return {"auto": dtype, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[name]
