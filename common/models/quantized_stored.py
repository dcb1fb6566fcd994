"""Quantised weights in a folder of our own: safetensors with the tensors of each, ready to be mapped.

`NAME.codes`, `NAME.scales`, `NAME.minimums`, … are the fields of a QuantizedWeight; quantized.json has
its kind, group and activations. Weights in plain numbers lie beside them under their own names.
"""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.kernels.quantized import ACTIVATIONS, BYTES, KINDS, QuantizedWeight
from common.models.config_json import is_whole
from common.models.errors import ModelError
from common.models.quantized_checks import FLOATS, Module, build
from common.models.weight_files import Header, read_json
from common.models.weight_writer import PADDING, WeightWriter

DESCRIPTION = "quantized.json"
SHARD_BYTES = 4 << 30
ALIGNMENT = 64  # bytes, for vector loads
FIELDS = ("codes", "scales", "minimums", "row_scales", "order")
CODES = {"int8": "I8", "fp8_e4m3": "F8_E4M3"}  # the others are nibbles
SCALES = (*FLOATS, "F8_E4M3", "F8_E8M0")

Reader = Callable[[tuple[int, int]], QuantizedWeight]


def write_weights(folder: Path, weights: Iterable[tuple[str, QuantizedWeight | Tensor]]) -> None:
    """Write weights one at a time: no more than one is in memory. Raises OSError."""
    described = {}
    with WeightWriter(folder, SHARD_BYTES, ALIGNMENT) as writer:
        for name, weight in weights:
            if isinstance(weight, Tensor):
                writer.write(name, weight.cpu())
                continue
            for field, tensor in weight.tensors.items():
                writer.write(f"{name}.{field}", tensor.cpu())
            kept = {"kind": weight.kind, "group": weight.group, "activations": weight.activations}
            described[name] = kept
    (folder / DESCRIPTION).write_text(json.dumps({"weights": described}))


def stored_weights(
    folder: Path,
    headers: dict[str, Header],
    read: Callable[[str, Header], Tensor],
    is_own: bool = False,
) -> tuple[dict[str, Reader], dict[str, Header]]:
    """What reads each quantised weight, by name; and the other tensors. Nothing is read here.

    is_own: written by this process' user, so that values need not be looked at. Raises ModelError.
    """
    path = folder / DESCRIPTION
    described = read_json(path).get("weights")
    if not isinstance(described, dict):
        raise ModelError(f"{path} has no weights")
    readers: dict[str, Reader] = {}
    rest = {name: h for name, h in headers.items() if not name.startswith(PADDING)}
    for name, kept in described.items():
        found = {field: rest.pop(f"{name}.{field}", None) for field in FIELDS}
        module = Module(name, {field: h for field, h in found.items() if h is not None}, read)
        _check(path, name, kept)
        readers[name] = _reader(module, kept, is_own)
    return readers, rest


def _check(path: Path, name: str, kept: Any) -> None:
    kept = kept if isinstance(kept, dict) else {}
    is_right = (
        kept.get("kind") in KINDS
        and is_whole(kept.get("group"))
        and 1 <= kept["group"] < 1 << 31
        and kept.get("activations") in ACTIVATIONS
    )
    if not is_right:
        raise ModelError(
            f"{path} has {name!r:.120} as {kept!r:.120}; expected kind, group, activations"
        )


def _reader(module: Module, kept: dict[str, Any], is_own: bool) -> Reader:
    return lambda shape: _read(module, kept, is_own, shape)


def _read(
    module: Module, kept: dict[str, Any], is_own: bool, shape: tuple[int, int]
) -> QuantizedWeight:
    """[out, in] of the fields' tensors. Raises ModelError."""
    kind, group = kept["kind"], kept["group"]
    out_features, in_features = shape
    if in_features % group or (kind not in BYTES and in_features % 2):
        raise module.fail("codes", f"are of {in_features} inputs in groups of {group}")
    by_group = (out_features, in_features // group)
    width = in_features if kind in BYTES else in_features // 2
    types = {
        "codes": ((CODES.get(kind, "U8"),), (out_features, width)),
        "scales": (SCALES, by_group),
        "minimums": (("F16", "F32"), by_group),
        "row_scales": (("F32",), (out_features,)),
        "order": (("I64",), (in_features,)),
    }
    for field in ("codes", "scales"):
        module.header(field)
    tensors = {field: module.take(field, *types[field]) for field in FIELDS if module.has(field)}

    def weight() -> QuantizedWeight:
        return QuantizedWeight(kind, group=group, activations=kept["activations"], **tensors)

    if is_own:
        return weight()
    for field in ("scales", "minimums", "row_scales"):
        if field in tensors:
            module.finite(field, tensors[field])
    if kind == "fp8_e4m3":
        module.fp8("codes", tensors["codes"])
    order = tensors.get("order")
    if order is not None and not torch.equal(order.sort().values, torch.arange(in_features)):
        raise module.fail("order", "is no permutation of the inputs")
    return build(module, "scales", weight)


def read_all(
    folder: Path, headers: dict[str, Header], read: Callable[[str, Header], Tensor]
) -> dict[str, QuantizedWeight]:
    """The quantised weights of a folder that `write_weights` made, as views of its mapped files."""
    readers, _ = stored_weights(folder, headers, read, is_own=True)
    weights = {}
    for name, reader in readers.items():
        header = headers[f"{name}.codes"]
        kinds = {dtype: kind for kind, dtype in CODES.items()}
        per_byte = 1 if header.dtype in kinds else 2
        weights[name] = reader((header.shape[0], header.shape[1] * per_byte))
    return weights
