"""Weights that are quantised on load."""

from collections.abc import Callable, Iterator
from pathlib import Path

from common.kernels.quantized import QuantizedWeight


def cached_weights(
    folder: Path, recipe: str, build: Callable[[], Iterator[tuple[str, QuantizedWeight]]]
) -> dict[str, QuantizedWeight]:
    return dict(build())
