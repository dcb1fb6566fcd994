"""What can be switched off in part 15, as data; and the configurations that follow from it.

"Everything" is the part's defaults with the fields of `on`. A technique is switched off by the fields of
`off`, all else as it is. One whose fields the part's EngineConfig does not have is left out, and said.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

EVERYTHING, NOTHING = "everything", "nothing"


@dataclass(frozen=True)
class Technique:
    """name: on the command line; title: in tables; on, off: fields of EngineConfig and their values."""

    name: str
    title: str
    off: dict[str, Any]
    on: dict[str, Any] = field(default_factory=dict)


TECHNIQUES = (
    Technique("kernels", "kernels", {"kernels": "reference"}),
    Technique("batching", "continuous batching", {"continuous_batching": False}),
    Technique("async", "asynchronous scheduling", {"async_scheduling": False}),
    Technique("chunks", "chunked prefill", {"enable_chunked_prefill": False}),
    Technique("graphs", "CUDA graphs, recordings", {"enforce_eager": True}),
    Technique("prefix", "prefix cache", {"prefix_cache": "off"}, {"prefix_cache": "hash"}),
    Technique("speculation", "speculation", {"speculative": "off"}, {"speculative": "ngram"}),
    Technique("offload", "host tier", {"offload": "off"}, {"offload": "both"}),
    Technique(
        "weights", "quantised weights", {"quantization": "off"}, {"quantization": "int8-g32"}
    ),
    Technique("kv", "quantised KV", {"kv_cache_dtype": "auto"}, {"kv_cache_dtype": "int8"}),
)
NAMES = tuple(technique.name for technique in TECHNIQUES)


@dataclass(frozen=True)
class Configuration:
    """One engine to measure. technique: the one that is off; None for all of them, or none."""

    name: str
    settings: dict[str, Any]
    technique: Technique | None = None


def known_techniques(
    techniques: Iterable[Technique], fields: set[str]
) -> tuple[list[Technique], list[str]]:
    """Those whose fields an EngineConfig has; and a line for each of the others."""
    known, missing = [], []
    for technique in techniques:
        lacking = (technique.on.keys() | technique.off.keys()) - fields
        if lacking:
            names = ", ".join(sorted(lacking))
            missing.append(f"{technique.title} is left out: the part's EngineConfig has no {names}")
        else:
            known.append(technique)
    return known, missing


def settings_with(
    techniques: Sequence[Technique], off: Sequence[Technique], base: dict[str, Any]
) -> dict[str, Any]:
    """Fields of the engine that has all techniques but those of `off`.

    base: what the user has set, which stays. A host tier without a prefix cache keeps preempted
    sequences alone.
    """
    settings: dict[str, Any] = {}
    for technique in techniques:
        settings |= technique.off if technique in off else technique.on
    settings |= base
    if settings.get("prefix_cache") == "off" and settings.get("offload") in ("prefix", "both"):
        settings["offload"] = "swap"
    return settings


def configurations(techniques: Sequence[Technique], base: dict[str, Any]) -> list[Configuration]:
    """Everything; each technique off in turn; nothing, where there are several."""
    found = [Configuration(EVERYTHING, settings_with(techniques, [], base))]
    for technique in techniques:
        settings = settings_with(techniques, [technique], base)
        found.append(Configuration(f"without {technique.title}", settings, technique))
    if len(techniques) > 1:
        found.append(Configuration(NOTHING, settings_with(techniques, techniques, base)))
    return found
