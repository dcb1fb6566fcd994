"""What `formats` compares: an engine's formats of weights, or of keys and values."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any

from common.bench.core.processes import child_environment, run_json
from common.bench.prefix.variants import config_class
from common.bench.speculative.variants import Variant

Settings = dict[str, Any]
PLAIN = "fp32"
# Formats whose groups divide every matrix of the embedded model; 128 does not divide 576. Names are
# those of `quality`: what follows + is what inputs are rounded to.
WEIGHTS: dict[str, Settings] = {
    PLAIN: {},
    **{
        name: {"quantization": name}
        for name in (
            "int8", "int8-g32", "int4", "int4-g64", "uint4", "fp8", "fp8-channel", "mxfp8", "mxfp4",
            "nvfp4", "nf4",
        )
    },
    **{
        f"{name}+int8": {"quantization": name, "activations": "int8"}
        for name in ("int8", "int8-g32", "int4", "uint4")
    },
    "fp8-channel+fp8": {"quantization": "fp8-channel", "activations": "fp8"},
    "q4_1": {"model": "smollm2-135m-q4_1"},
    "q4_1+int8": {"model": "smollm2-135m-q4_1", "activations": "int8"},
}  # fmt: skip
KV: dict[str, Settings] = {
    PLAIN: {},
    "kv-int8": {"kv_cache_dtype": "int8"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
}


@dataclass
class FormatVariant(Variant):
    """A part with some fields of its EngineConfig. first: what the worker said of its first start;
    starts: seconds of building the engine at all others."""

    settings: Settings = field(default_factory=dict)
    first: dict[str, Any] = field(default_factory=dict)
    starts: list[float] = field(default_factory=list)

    @property
    def in_words(self) -> str:
        words = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        return words or "as it comes"

    @property
    def is_checkpoint(self) -> bool:
        """Whether its weights are in a format that the checkpoint chose."""
        return "model" in self.settings


def make_variant(
    name: str,
    settings: Settings,
    part: int,
    model: str,
    base: Settings,
    rounds: int,
    environment: dict[str, str],
    verbose: bool,
) -> FormatVariant:
    """Raises ValueError for what the part's EngineConfig does not take."""
    own = {key: value for key, value in settings.items() if key != "model"}
    chosen = settings.get("model", model)
    try:
        config_class(part)(model=chosen, **base, **own)
    except TypeError as error:
        raise ValueError(str(error).replace("EngineConfig.__init__() ", "")) from None
    job = {"job": "formats", "part": part, "model": chosen, "settings": {**base, **own}}
    command = [sys.executable, "-m", "common.bench.quantized.worker"]

    def run(work: list[dict[str, Any]]) -> dict[str, Any]:
        answer = run_json(
            command, {**job, **work[0]}, {**child_environment(), **environment}, name, 3600, verbose
        )
        variant.starts.append(answer["construct_s"])
        return answer

    variant = FormatVariant(name, run, rounds, settings=settings)
    return variant


def start_first(variant: FormatVariant, work: dict[str, Any]) -> None:
    """Start it where nothing of it is kept yet, and decode nothing. Raises BenchError."""
    variant.first = variant.run([{**work, "batch_sizes": []}])
    variant.starts.clear()


@contextmanager
def empty_caches() -> Iterator[Callable[[], dict[str, str]]]:
    """A function that gives, each time, an environment in which no quantised weights are kept yet; the
    converted model and compiled kernels are the user's own. Its folders go with the context."""
    from common.models.embedded import FOLDER, cache_dir, embedded_model

    embedded_model()  # is made now if it is not there
    kernels = os.environ.get("NUMBA_CACHE_DIR") or str(cache_dir())
    converted = cache_dir() / FOLDER
    with TemporaryDirectory(prefix="formats-") as parent:

        def environment() -> dict[str, str]:
            folder = Path(mkdtemp(dir=parent))
            if converted.exists():
                (folder / FOLDER).symlink_to(converted)
            return {"FIFTEEN_ENGINES_CACHE": str(folder), "NUMBA_CACHE_DIR": kernels}

        yield environment
