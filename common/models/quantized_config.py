"""What config.json says of a quantised checkpoint, checked before any tensor is read.

The sizes of its groups and codes follow from the tensors' shapes; the config must agree. Which
modules are quantised is not looked up here: those whose codes are in the files are, whatever the lists
of modules to leave alone say. Layouts: AutoGPTQ and GPTQModel, AutoAWQ (`gemm`), compressed-tensors
(vllm-project), and the FP8 files of DeepSeek-V3 and AutoFP8.
"""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.models.config_json import is_whole
from common.models.errors import ModelError
from common.models.weight_files import read_json

# Of compressed-tensors. The others are sparse, or of codes that are not read.
FORMATS = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
    "mxfp8-quantized",
    "mixed-precision",
)
LARGEST_GROUP = 1 << 20  # inputs
MOST_STEPS = 10_000_000  # that matching a name with a pattern may take at worst
MOST_STEPS_IN_ALL = 500_000_000  # for all names and patterns of a checkpoint
LONGEST_PATTERN = 256
# What has no meaning of its own in a pattern: escaped characters, and sets of characters.
CHARACTERS = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)


@dataclass(frozen=True)
class Scheme:
    """How one kind of modules is quantised."""

    bits: int = 4
    type: str = "int"
    is_symmetric: bool = True
    group: int | None = None  # inputs that share a scale; -1: all; None: as the tensors say
    block: tuple[int, int] | None = None  # outputs and inputs
    activations: str | None = None  # as a QuantizedWeight has it
    targets: tuple[str, ...] = ()


class Steps:
    """What comparing modules with targets may still take, in all of a load."""

    def __init__(self) -> None:
        self.left = MOST_STEPS_IN_ALL

    def take(self, number: int, target: str) -> None:
        """Raises ModelError."""
        self.left -= number
        if number > MOST_STEPS or self.left < 0:
            raise ModelError(
                f"config.json has the target {target!r:.80}, which could take long to match"
            )


@dataclass(frozen=True)
class Quantization:
    """A checkpoint's quantisation. notes: what is read but not done as the config has it, in words."""

    method: str
    schemes: tuple[Scheme, ...] = ()
    zero_offset: int = 0  # added to GPTQ's zero points
    is_reordered: bool = False  # whether modules must say which group an input is of
    varies: bool = False  # whether modules differ from the scheme
    notes: tuple[str, ...] = ()
    steps: Steps = field(default_factory=Steps, compare=False)


class Fields:
    """A JSON object whose fields are asked for by type. Raises ModelError with file and value."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ModelError(f"{where} is {values!r:.60}; expected an object")
        self.values, self.where = values, where

    def get(self, *names: str, default: Any = None) -> Any:
        """The first of the fields that is there and not null."""
        found = (self.values.get(name) for name in names)
        return next((value for value in found if value is not None), default)

    def fail(self, name: str, expected: str) -> ModelError:
        value = self.values.get(name)
        return ModelError(f"{self.where} has {name} {value!r:.60}; expected {expected}")

    def one_of(self, name: str, *allowed: Any, default: Any = None) -> Any:
        value = self.get(name, default=default)
        if not any(type(value) is type(one) and value == one for one in allowed):
            raise self.fail(name, " or ".join(map(repr, allowed)))
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        return self.one_of(name, True, False, default=default)

    def group(self, *names: str) -> int:
        """A size of a group: -1 or a positive number."""
        size = self.get(*names)
        if not is_whole(size) or not (size == -1 or 1 <= size <= LARGEST_GROUP):
            raise self.fail(names[0], f"-1 or a whole number from 1 to {LARGEST_GROUP}")
        return size

    def block(self, name: str) -> tuple[int, int] | None:
        sizes = self.get(name)
        if sizes is None:
            return None
        right = isinstance(sizes, list) and len(sizes) == 2 and all(map(is_whole, sizes))
        if not right or not all(1 <= size <= LARGEST_GROUP for size in sizes):
            raise self.fail(name, "two positive whole numbers")
        return sizes[0], sizes[1]

    def strings(self, name: str) -> tuple[str, ...]:
        found = self.get(name, default=[])
        if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
            raise self.fail(name, "a list of strings")
        return tuple(found)

    def nothing(self, *names: str) -> None:
        """Fields that would change what weights mean, and are not read."""
        for name in names:
            if self.get(name):
                raise self.fail(name, "none: it is not read here")

    def inner(self, name: str) -> "Fields | None":
        value = self.get(name)
        return None if value is None else Fields(value, f"{self.where}.{name}")


def read_quantization(folder: Path) -> Quantization | None:
    """The quantisation of a model's folder; None where config.json has none. Raises ModelError."""
    path = folder / "config.json"
    values = read_json(path).get("quantization_config")
    if values is None:
        return None
    fields = Fields(values, f"{path} quantization_config")
    method = fields.get("quant_method")
    known = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed,
        "fp8": _fp8,
        "gguf": _gguf,
    }
    if not isinstance(method, str) or method not in known:
        raise fields.fail("quant_method", "one of " + ", ".join(known))
    return known[method](fields)


def _gguf(fields: Fields) -> Quantization:
    return Quantization("gguf")


def _gptq(fields: Fields) -> Quantization:
    name = "checkpoint_format" if fields.get("checkpoint_format") is not None else "format"
    layout = fields.one_of(name, "gptq", "gptq_v2", default="gptq")
    fields.nothing("is_marlin_format", "use_marlin")
    fields.one_of("pack_dtype", "int32", default="int32")
    scheme = Scheme(fields.one_of("bits", 4, 8), group=fields.group("group_size"))
    return Quantization(
        "gptq",
        (scheme,),
        zero_offset=1 if layout == "gptq" else 0,
        is_reordered=fields.flag("desc_act") and scheme.group != -1,
        varies=bool(fields.get("dynamic")),
    )


def _awq(fields: Fields) -> Quantization:
    version = fields.get("version", default="gemm")
    if not isinstance(version, str) or version.lower() != "gemm":
        raise fields.fail("version", "'gemm'")
    if not fields.flag("zero_point", default=True):
        raise fields.fail("zero_point", "true")
    name = "bits" if fields.get("bits") is not None else "w_bit"
    scheme = Scheme(
        fields.one_of(name, 4), is_symmetric=False, group=fields.group("group_size", "q_group_size")
    )
    return Quantization("awq", (scheme,))


def _fp8(fields: Fields) -> Quantization:
    fields.one_of("fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    activations = fields.one_of("activation_scheme", "dynamic", "static", default="dynamic")
    block = fields.block("weight_block_size")
    notes = ()
    if activations == "static":
        notes = ("fixed scales of activations are not used: each token gets its own",)
    return Quantization("fp8", (Scheme(8, "float", block=block, activations="fp8"),), notes=notes)


def _compressed(fields: Fields) -> Quantization:
    fields.one_of("format", *FORMATS)
    fields.nothing("transform_config")
    sparsity = fields.inner("sparsity_config")
    if sparsity is not None and sparsity.values:
        sparsity.one_of("format", "dense")
    groups = fields.inner("config_groups")
    if groups is None or not groups.values:
        raise fields.fail("config_groups", "an object with at least one group")
    notes: dict[str, None] = {}
    if fields.get("kv_cache_scheme"):
        notes["keys and values are kept as kv_cache_dtype says, not as kv_cache_scheme does"] = None
    schemes = [
        _scheme(Fields(group, f"{groups.where}.{name!r:.40}"), notes)
        for name, group in groups.values.items()
    ]
    return Quantization("compressed-tensors", tuple(schemes), notes=tuple(notes))


def _scheme(fields: Fields, notes: dict[str, None]) -> Scheme:
    """A group of compressed-tensors' config."""
    if fields.get("format") is not None:
        fields.one_of("format", *FORMATS)
    fields.nothing("output_activations")
    weights = fields.inner("weights")
    if weights is None:
        raise fields.fail("weights", "an object")
    type_ = weights.one_of("type", "int", "float", default="int")
    bits = weights.one_of("num_bits", 4, 8, default=8)
    strategies = ("tensor", "channel", "group", "block", "tensor_group")
    strategy = weights.get("strategy")
    group = None if weights.get("group_size") is None else weights.group("group_size")
    if strategy is None:
        strategy = "channel" if group == -1 else "tensor" if group is None else "group"
    else:
        weights.one_of("strategy", *strategies)
    block = weights.block("block_structure")
    if (block is None) == (strategy == "block"):
        raise weights.fail("block_structure", "two numbers with the strategy 'block' alone")
    if strategy in ("group", "tensor_group") and (group is None or group < 1):
        raise weights.fail("group_size", f"a positive number with the strategy {strategy!r}")
    is_symmetric = weights.flag("symmetric", default=True)
    if type_ == "float" and not is_symmetric:
        raise weights.fail("symmetric", "true with floating-point codes")
    fields.strings("targets")
    return Scheme(
        bits,
        type_,
        is_symmetric,
        group if strategy in ("group", "tensor_group") else -1,
        block,
        _activations(fields.inner("input_activations"), type_, notes),
        fields.strings("targets"),
    )


def _activations(fields: Fields | None, weight_type: str, notes: dict[str, None]) -> str | None:
    """What inputs are rounded to. A note where it is not quite what the config has."""
    if fields is None:
        return None
    type_ = fields.one_of("type", "int", "float", default="int")
    bits = fields.one_of("num_bits", 4, 8, default=8)
    fields.one_of("symmetric", True, default=True)
    if bits == 4:
        notes["activations of 4 bits are not rounded: the weights alone are quantised"] = None
        return None
    if type_ == "int" and weight_type == "float":
        raise fields.fail("type", "'float' with floating-point weights")
    if not fields.get("dynamic", default=False):
        notes["fixed scales of activations are not used: each token gets its own"] = None
    return "int8" if type_ == "int" else "fp8"


def scheme_of(module: str, quantization: Quantization) -> Scheme:
    """The scheme that a module of a quantised checkpoint follows. Raises ModelError."""
    schemes, steps = quantization.schemes, quantization.steps
    if len(schemes) == 1:
        return schemes[0]
    for scheme in schemes:
        targets = (target for target in scheme.targets if target != "Linear")
        if any(_matches(module, target, steps) for target in targets):
            return scheme
    for scheme in schemes:
        if "Linear" in scheme.targets:
            return scheme
    raise ModelError(f"config.json names no group of quantization_config for {module:.120}")


def _matches(module: str, target: str, steps: Steps) -> bool:
    """Whether a target names a module. Patterns are a stranger's: one that could take long fails."""
    if not target.startswith("re:"):
        steps.take(1, target)
        return target == module
    pattern = target.removeprefix("re:")
    steps.take(most_steps(pattern, len(module)), target)
    try:
        return re.match(pattern, module) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise ModelError(f"config.json has the target {target!r:.80}: {error}") from error


def most_steps(pattern: str, length: int) -> int:
    """Ways in which a pattern can be laid over a text of that length, or more than MOST_STEPS.

    Repeats share the text, and each group takes one of its alternatives. What is not bounded so is
    repeated groups, and what looks back or ahead.
    """
    is_nested = re.search(r"\)[*+{]|\\[1-9]|\(\?[^:]", pattern)
    if is_nested or len(pattern) > LONGEST_PATTERN:
        return MOST_STEPS + 1
    repeats = len(re.findall(r"[*+{?]", pattern))
    ways, alternatives = math.comb(length + repeats, repeats), [1]
    for sign in CHARACTERS.sub("", pattern):
        if sign == "(":
            alternatives.append(1)
        elif sign == "|":
            alternatives[-1] += 1
        elif sign == ")" and len(alternatives) > 1:
            ways *= alternatives.pop()
    return ways * math.prod(alternatives)
