"""A weight as codes and scales: what the quantised products of all implementations are made from.

A format (INT4 in groups, MXFP4, a GPTQ file, …) is a way to get codes and scales. What they mean is
the same for all of them, and is written here once:

    weight[o, i] = value(codes[o, i]) * scales[o, i // group] * row_scales[o] + minimums[o, i // group]

in float32, from left to right. `dequantize` is the oracle of every kernel.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# What a code of 4 bits stands for. E2M1 has a sign, two bits of exponent and one of mantissa; NF4's
# values are quantiles of a normal distribution (Dettmers et al., "QLoRA", arXiv 2305.14314).
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
TABLES = {
    "int4": tuple(float(code - 8) for code in range(16)),
    "uint4": tuple(float(code) for code in range(16)),
    "fp4_e2m1": (*E2M1, *(-value for value in E2M1)),
    "nf4": NF4,
}
BYTES = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn}  # kinds of 8 bits
KINDS = (*BYTES, *TABLES)
SCALES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e8m0fnu,
)
ACTIVATIONS = (None, "int8", "fp8")
INT8_MAX, FP8_MAX = 127.0, 448.0
SMALLEST = 1e-36  # inputs below are zeros: the reciprocal of less overflows


def pack_nibbles(codes: Tensor) -> Tensor:
    """[…, n] of 0 to 15 to […, n / 2] uint8: the even element in the low nibble."""
    low, high = codes.to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
    return low | high << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2)


@dataclass(frozen=True)
class QuantizedWeight:
    """[out_features, in_features]. Raises ValueError where sizes and types do not fit.

    kind: how a code is read. int8 and fp8_e4m3: codes are of that dtype, [out, in]. int4 (a nibble
    minus 8), uint4, fp4_e2m1, nf4: codes are uint8, [out, in / 2], the even element in the low nibble.
    group: inputs that share a scale; in_features where a row has one.
    minimums: of a format that is not symmetric. row_scales: a second level.
    order: the columns of codes are those of the inputs x[:, order] (GPTQ's `act-order`).
    activations: what inputs are rounded to before the product (`round_activations`); None: nothing.
    """

    kind: str
    codes: Tensor
    scales: Tensor  # [out, in / group], one of SCALES
    group: int
    minimums: Tensor | None = None  # [out, in / group] float32 or float16
    row_scales: Tensor | None = None  # [out] float32
    order: Tensor | None = None  # [in] int64
    activations: str | None = None

    def __post_init__(self) -> None:
        dtype = BYTES.get(self.kind, torch.uint8)
        if self.kind not in KINDS or self.codes.dtype is not dtype or self.codes.dim() != 2:
            shape = f"{self.codes.dtype} {list(self.codes.shape)}"
            raise ValueError(f"quantised weight: kind {self.kind!r} with codes of {shape}")
        out_features, in_features = self.shape
        if self.group < 1 or in_features % self.group or self.scales.dtype not in SCALES:
            raise ValueError(
                f"quantised weight: {in_features} inputs in groups of {self.group}, scales of"
                f" {self.scales.dtype}"
            )
        if self.activations not in ACTIVATIONS:
            raise ValueError(f"quantised weight: activations {self.activations!r}")
        by_group = (out_features, in_features // self.group)
        sizes = {"scales": by_group, "minimums": by_group}
        sizes |= {"row_scales": (out_features,), "order": (in_features,)}
        for name, size in sizes.items():
            tensor = getattr(self, name)
            if tensor is not None and tensor.shape != size:
                found = list(tensor.shape)
                raise ValueError(f"quantised weight: {name} is {found}, not {list(size)}")

    @property
    def shape(self) -> tuple[int, int]:
        out_features, width = self.codes.shape
        return out_features, width if self.kind in BYTES else width * 2

    @property
    def tensors(self) -> dict[str, Tensor]:
        names = ("codes", "scales", "minimums", "row_scales", "order")
        found = {name: getattr(self, name) for name in names}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def values(self) -> Tensor:
        """What the codes stand for before they are scaled, [out, in] float32."""
        if self.kind in BYTES:
            return self.codes.float()
        table = torch.tensor(TABLES[self.kind], device=self.codes.device)
        return table[unpack_nibbles(self.codes).int()]

    def dequantize(self) -> Tensor:
        """[out, in] float32, its columns in the order of the inputs."""
        scales = self.scales.float()
        weight = self.values().unflatten(1, (-1, self.group)) * scales.unsqueeze(2)
        if self.row_scales is not None:
            weight = weight * self.row_scales[:, None, None]
        if self.minimums is not None:
            weight = weight + self.minimums.float().unsqueeze(2)
        weight = weight.flatten(1)
        return weight if self.order is None else weight[:, self.order.argsort()]

    def rows(self, part: slice | Tensor) -> "QuantizedWeight":
        """Some outputs: a slice, or indices [n] int64."""
        names = ("codes", "scales", "minimums", "row_scales")
        found = {name: getattr(self, name) for name in names}
        return replace(self, **{n: t if t is None else t[part] for n, t in found.items()})

    def columns(self, part: slice) -> "QuantizedWeight":
        """Some inputs. Where they begin or end inside a group, groups become smaller, each with the
        scale that its numbers had. Raises ValueError for half bytes, and where inputs are reordered."""
        begin, end, _ = part.indices(self.shape[1])
        size, group = end - begin, self.group
        if (begin, end) == (0, self.shape[1]):
            return self
        if self.order is not None:
            raise ValueError(f"inputs {begin} to {end} of a weight whose columns are reordered")
        is_whole = group == self.shape[1]
        smaller = size if is_whole else math.gcd(begin, end, group)
        times = 1 if is_whole else group // smaller
        groups = slice(None) if is_whole else slice(begin // smaller, end // smaller)

        def cut(levels: Tensor | None) -> Tensor | None:
            return None if levels is None else repeated(levels, times)[:, groups]

        if self.kind in BYTES:
            codes = self.codes[:, part]
        elif begin % 2 or end % 2:
            raise ValueError(f"inputs {begin} to {end} of a weight of 4 bits: both must be even")
        else:
            codes = self.codes[:, begin // 2 : end // 2]
        changed = {"codes": codes, "scales": cut(self.scales), "minimums": cut(self.minimums)}
        return replace(self, **changed, group=smaller)


def repeated(levels: Tensor, times: int) -> Tensor:
    """Each column so many times; in the dtype's bytes, since not all dtypes can be repeated."""
    if times == 1:
        return levels
    number = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[levels.element_size()]
    return levels.view(number).repeat_interleave(times, dim=1).view(levels.dtype)


def can_join(weights: Sequence[QuantizedWeight]) -> bool:
    """Whether weights of the same inputs can become one, output after output."""

    def like(weight: QuantizedWeight) -> tuple[object, ...]:
        kinds = (weight.kind, weight.group, weight.scales.dtype, weight.activations)
        return *kinds, weight.minimums is None, weight.row_scales is None

    first = weights[0]
    orders = [w.order for w in weights]
    same_order = all(
        (a is None) == (orders[0] is None) and (a is None or torch.equal(a, orders[0]))
        for a in orders
    )
    return same_order and all(like(weight) == like(first) for weight in weights)


def join(weights: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Weights of the same inputs as one, output after output. Ask `can_join` first."""
    if len(weights) == 1:
        return weights[0]

    def cat(name: str) -> Tensor | None:
        tensors = [getattr(weight, name) for weight in weights]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("codes", "scales", "minimums", "row_scales")
    return replace(weights[0], **{name: cat(name) for name in names})


def round_activations(x: Tensor, activations: str | None, group: int) -> Tensor:
    """x as the product takes it: rounded to `activations` and back, in x's dtype.

    int8: a scale for each token and group of inputs, amax / 127; codes are rounded half to even.
    fp8 (E4M3): a scale for each token, amax / 448. Computed in float32: x times the reciprocal
    (127 / amax), rounded, times (amax / 127). x: [num_tokens, in_features].
    """
    if activations is None:
        return x
    values = x.float()
    if activations == "int8":
        values = values.unflatten(1, (-1, group))
    most = INT8_MAX if activations == "int8" else FP8_MAX
    amax = values.abs().amax(dim=-1, keepdim=True)
    factor = torch.where(amax > SMALLEST, most * amax.reciprocal(), 0.0)
    if activations == "int8":
        rounded = (values * factor).round().clamp(-most, most)
    else:
        rounded = (values * factor).clamp(-most, most).to(torch.float8_e4m3fn).float()
    return (rounded * (amax / most)).reshape(x.shape).to(x.dtype)
