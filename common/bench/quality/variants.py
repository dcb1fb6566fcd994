"""What `quality` compares: settings of an engine by name."""

import argparse
import dataclasses
import importlib
from typing import Any

from common.bench.core.arguments import setting
from common.bench.core.processes import part_package

REFERENCE = "reference"
KV_FORMATS = ("int8", "fp8")
QUICK = ("int8", "int8+int8", "int4", "kv-int8")

Settings = dict[str, Any]


def known_variants(part: int) -> dict[str, Settings]:
    """Each weight format with the embedding as it is and as the part has it by default, INT8 inputs
    and FP8 inputs where they are made for that, each format of keys and values, and one of both.

    Raises ValueError where the part has no formats.
    """
    package = part_package(part)
    try:
        formats = importlib.import_module(f"{package}.quantization").FORMATS
    except ModuleNotFoundError:
        raise ValueError(f"part {part:02d} has no number formats: part 14 is the first") from None
    found: dict[str, Settings] = {}
    for name in formats:
        found[name] = {"quantization": name}
    found["int4, embedding fp32"] = {"quantization": "int4", "quantize_embeddings": "off"}
    found["int8+int8"] = {"quantization": "int8", "activations": "int8"}
    found["int4+int8"] = {"quantization": "int4", "activations": "int8"}
    found["fp8-channel+fp8"] = {"quantization": "fp8-channel", "activations": "fp8"}
    found |= {f"kv-{name}": {"kv_cache_dtype": name} for name in KV_FORMATS}
    found["int4, kv-int8"] = {"quantization": "int4", "kv_cache_dtype": "int8"}
    return found


def own_variant(text: str) -> tuple[str, Settings]:
    """NAME:KEY=VALUE,KEY=VALUE; the key `model` names another checkpoint."""
    name, colon, settings = text.partition(":")
    if not name or not colon or not settings:
        raise argparse.ArgumentTypeError(f"must be NAME:KEY=VALUE,…, not {text!r}")
    return name, dict(setting(one) for one in settings.split(","))


def chosen_variants(args: argparse.Namespace) -> dict[str, Settings]:
    """Those that the flags name, in their order. Raises ValueError."""
    known = known_variants(args.part)
    default = QUICK if args.quick else [] if args.add else list(known)
    names = args.variants if args.variants is not None else default
    for name in names:
        if name not in known:
            raise ValueError(f"variants: {name!r} is none of {', '.join(known)}")
    return {name: known[name] for name in names} | dict(args.add)


def check_settings(part: int, settings: Settings) -> None:
    """Raises ValueError for what the part's EngineConfig does not take."""
    config = importlib.import_module(f"{part_package(part)}.config").EngineConfig
    fields = {field.name for field in dataclasses.fields(config)}
    for name in settings:
        if name not in fields:
            raise ValueError(f"{name!r} is no setting of part {part:02d}")
    config(**settings)
