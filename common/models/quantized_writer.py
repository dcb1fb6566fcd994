"""A quantised model as a folder in the layout of compressed-tensors, which vLLM and transformers read.

INT4 is `pack-quantized`: codes of 4 bits plus 8, eight of them in an int32, the first in the lowest
bits (`weight_packed`), a scale for each row and group (`weight_scale`), and the shape without packing
(`weight_shape`). INT8 is `int-quantized`: codes as they are (`weight`), a scale for each row; the
products' inputs are rounded to INT8 for each token when they come. What is not quantised stands there as in
any checkpoint. https://github.com/vllm-project/compressed-tensors, version 0.20.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from common.kernels.quantized import QuantizedWeight
from common.models.errors import ModelError
from common.models.upcycle import copy_others
from common.models.weight_files import read_json
from common.models.weight_writer import WeightWriter

SHARD_BYTES = 2 << 30
SYMMETRIC = {"type": "int", "symmetric": True}


def quantization_config(weight: QuantizedWeight, ignore: list[str]) -> dict[str, Any]:
    """The entry `quantization_config` of config.json, for a model whose linear layers are like this
    one but for those of the names in `ignore`. Raises ModelError for what has no such form."""
    whole = weight.group == weight.shape[1]
    if weight.minimums is not None or weight.order is not None or weight.row_scales is not None:
        raise ModelError("compressed-tensors are written of symmetric weights with one scale")
    inputs = None
    if weight.kind == "int4":
        bits, name = 4, "pack-quantized"
    elif weight.kind == "int8" and whole:
        bits, name = 8, "int-quantized"
        inputs = {"num_bits": 8, "strategy": "token", "dynamic": True, **SYMMETRIC}
    else:
        raise ModelError(f"compressed-tensors are not written of {weight.kind} in {weight.group}")
    how = {"strategy": "channel"} if whole else {"strategy": "group", "group_size": weight.group}
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": bits, "dynamic": False, **how, **SYMMETRIC},
        "input_activations": inputs,
        "output_activations": None,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": name,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignore,
    }


def compressed(name: str, weight: QuantizedWeight) -> dict[str, torch.Tensor]:
    """A weight's tensors by their names in the file; name: of the layer, without `.weight`."""
    if weight.kind == "int8":
        return {f"{name}.weight": weight.codes, f"{name}.weight_scale": weight.scales}
    # A byte's low nibble is the earlier code, and so is an int32's low byte: the packing is the same.
    packed = torch.nn.functional.pad(weight.codes, (0, -weight.codes.shape[1] % 4))
    return {
        f"{name}.weight_packed": packed.contiguous().view(torch.int32),
        f"{name}.weight_scale": weight.scales,
        f"{name}.weight_shape": torch.tensor(weight.shape),
    }


class QuantizedWriter:
    """The new folder of a quantised model. A context: the folder appears by one rename when it ends
    without an error; with one it leaves nothing. Raises ModelError where the folder is not empty or
    cannot be written."""

    def __init__(self, source: Path, target: Path) -> None:
        self.source, self.target = source, target
        self.first: QuantizedWeight | None = None

    def __enter__(self) -> "QuantizedWriter":
        target = self.target
        try:
            if target.is_symlink() or (target.exists() and not target.is_dir()):
                raise ModelError(f"{target} is no folder")
            if target.is_dir() and any(target.iterdir()):
                raise ModelError(f"{target} is not empty; give a folder that is to be made")
            target = target.resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            self.temporary = Path(
                tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
            )
            self.weights = WeightWriter(self.temporary, SHARD_BYTES)
        except OSError as error:
            raise ModelError(f"cannot write {target}: {error.strerror or error}") from error
        return self

    def write(self, name: str, weight: torch.Tensor | QuantizedWeight) -> None:
        """name: with `.weight` or `.bias`, as in the model."""
        tensors = {name: weight}
        if isinstance(weight, QuantizedWeight):
            self.first = self.first or weight
            tensors = compressed(name.removesuffix(".weight"), weight)
        try:
            for own_name, tensor in tensors.items():
                self.weights.write(own_name, tensor)
        except OSError as error:
            reason = error.strerror or error
            raise ModelError(f"cannot write {self.target}: {reason}") from error

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            self.weights.__exit__(kind, error, traceback)
            if error is None:
                self.finish()
        except OSError as failure:
            reason = failure.strerror or failure
            raise ModelError(f"cannot write {self.target}: {reason}") from failure
        finally:
            shutil.rmtree(self.temporary, ignore_errors=True)

    def finish(self) -> None:
        """Write what is not weights, and give the folder its name. Raises OSError where that has come to
        be another's."""
        assert self.first is not None, "no quantised weight was written"
        config = read_json(self.source / "config.json")
        config["quantization_config"] = quantization_config(self.first, ["lm_head"])
        copy_others(self.source, self.temporary)
        (self.temporary / "config.json").write_text(json.dumps(config, indent=2))
        for file in self.temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as handle:
                    os.fsync(handle.fileno())
        self.temporary.chmod(0o755)
        self.temporary.rename(self.target.resolve())
