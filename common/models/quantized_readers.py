"""The weights of a quantised checkpoint by the names that a plain one would have.

The tensors of a module (`….up_proj.qweight`, `….up_proj.scales`) are one weight,
`….up_proj.weight`. A module whose weight is there in plain numbers is left as it is.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from common.kernels.quantized import QuantizedWeight
from common.models.errors import ModelError
from common.models.expert_names import plain_name
from common.models.quantized_checks import Module
from common.models.quantized_compressed import read_compressed, read_deepseek
from common.models.quantized_config import Quantization
from common.models.quantized_integers import read_awq, read_gptq
from common.models.weight_files import Header
from common.models.weights import OF_A_MODEL, PREFIX, name_in_model

Reader = Callable[[tuple[int, int]], QuantizedWeight]
INTEGERS = ("qweight", "qzeros", "scales", "g_idx")
COMPRESSED = (
    "weight_packed",
    "weight_scale",
    "weight_zero_point",
    "weight_shape",
    "weight_g_idx",
    "weight_global_scale",
    "input_scale",
    "input_zero_point",
    "input_global_scale",
)
# By method: the tensors of a module, those of them that hold codes, and what reads it.
METHODS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Any]] = {
    "gptq": (INTEGERS, ("qweight",), read_gptq),
    "awq": (INTEGERS, ("qweight",), read_awq),
    "compressed-tensors": (COMPRESSED, ("weight_packed", "weight"), read_compressed),
    "fp8": (("weight_scale_inv", "weight_scale", "input_scale"), ("weight",), read_deepseek),
}


def quantized_modules(
    headers: dict[str, Header], config: Quantization, read: Callable[[str, Header], Tensor]
) -> tuple[dict[str, Reader], dict[str, Header]]:
    """What reads each quantised weight, by its name in the model; and the other tensors.

    read: reads a tensor by its name in the file, to the CPU. Nothing is read here. Raises
    ModelError where two modules have one name.
    """
    words, of_codes, read_module = METHODS[config.method]
    modules: dict[str, dict[str, Header]] = {}
    for name, header in headers.items():
        module, _, word = name.rpartition(".")
        is_codes = word == "weight" and word in of_codes and not header.is_number
        if module and (word in words or is_codes):
            modules.setdefault(module, {})[word] = header
    modules = {m: found for m, found in modules.items() if any(map(found.get, of_codes))}
    taken = {f"{module}.{word}" for module, found in modules.items() for word in found}
    rest = {name: header for name, header in headers.items() if name not in taken}
    readers: dict[str, Reader] = {}
    for name, found in modules.items():
        weight = name_in_model(plain_name(f"{name}.weight"), PREFIX, OF_A_MODEL.match)
        if weight in readers or f"{name}.weight" in rest:
            raise ModelError(f"the checkpoint has {weight!r:.120} twice")
        readers[weight] = _reader(read_module, Module(name, found, read), config)
    return readers, rest


def _reader(read_module: Any, module: Module, config: Quantization) -> Reader:
    return lambda shape: read_module(module, config, shape)
