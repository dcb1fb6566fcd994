"""compressed-tensors' weights, and the FP8 files of DeepSeek-V3 and AutoFP8.

Packed integers: `weight_packed` [out, in * bits / 32] int32, the first input in the lowest bits, each
plus half the range; `weight_zero_point` is packed along the outputs. Integers and FP8: `weight` in
their own type. FP4: `weight_packed` [out, in / 2] uint8, the even input low, with scales of 16 inputs
in E4M3 under a factor that they were multiplied by (`weight_global_scale`), or of 32 as powers of two.
A scale is of the tensor, of an output, of a group of inputs or of a block, [out / rows, in / columns].
"""

import torch
from torch import Tensor

from common.kernels.quantized import QuantizedWeight, unpack_nibbles
from common.models.errors import ModelError
from common.models.quantized_checks import FLOATS, Module, build
from common.models.quantized_config import Quantization, Scheme, scheme_of
from common.models.quantized_integers import centred, reordered

SCALE, PACKED, ZERO = "weight_scale", "weight_packed", "weight_zero_point"


def read_compressed(
    module: Module, config: Quantization, shape: tuple[int, int]
) -> QuantizedWeight:
    """[out, in] by what the module's tensors are. Raises ModelError."""
    scheme = scheme_of(module.name, config)
    if scheme.is_symmetric:
        _expect_no_zero_points(module, scheme.bits)
    if module.has(PACKED):
        read = read_packed if module.header(PACKED).dtype == "I32" else read_fp4
        return read(module, scheme, shape)
    if module.header("weight").dtype == "I8":
        return read_int8(module, scheme, shape)
    return read_fp8(module, scheme, SCALE, shape)


def read_deepseek(module: Module, config: Quantization, shape: tuple[int, int]) -> QuantizedWeight:
    """FP8 with `weight_scale_inv` (a factor, in spite of its name) or `weight_scale`."""
    scheme = scheme_of(module.name, config)
    word = "weight_scale_inv" if scheme.block else SCALE
    return read_fp8(module, scheme, word, shape)


def read_packed(module: Module, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Integers of 4 or 8 bits in 32-bit words."""
    out_features, in_features = shape
    bits = scheme.bits
    expect_type(module, PACKED, scheme, "int", (4, 8))
    if bits == 4 and in_features % 2:
        raise module.fail(PACKED, f"has {in_features} inputs, an odd number")
    width = -(-in_features * bits // 32)
    packed = module.take(PACKED, ("I32",), (out_features, width))
    if module.has("weight_shape"):
        found = module.take("weight_shape", ("I64", "I32"), (2,)).tolist()
        if found != list(shape):
            raise module.fail("weight_shape", f"is {found!s:.60}, not {list(shape)}")
    codes = packed.contiguous().view(torch.uint8)[:, : in_features * bits // 8].contiguous()
    scales, group = read_scales(module, SCALE, scheme, shape, FLOATS)
    zeros = _zero_points(module, scheme, (out_features, scales.shape[1]))
    order = None
    if module.has("weight_g_idx"):
        order = module.order("weight_g_idx", scales.shape[1], in_features)
    codes = reordered(codes, order, bits)
    kind, codes, scales, minimums = centred(codes, zeros + (1 << bits - 1), scales, bits)
    activations = scheme.activations
    return build(
        module,
        SCALE,
        lambda: QuantizedWeight(kind, codes, scales, group, minimums, None, order, activations),
    )


def _zero_points(module: Module, scheme: Scheme, shape: tuple[int, int]) -> Tensor:
    """[out, groups] int32, 0 where codes are symmetric. Packed along the outputs, or int8."""
    word, bits = ZERO, scheme.bits
    if scheme.is_symmetric:
        return torch.zeros(shape, dtype=torch.int32)
    out_features, groups = shape
    if module.header(word).dtype == "I8":
        shapes = [shape, (out_features,), (1,)][: 3 if groups == 1 else 1]
        found = module.take(word, ("I8",), *shapes).int().reshape(-1, groups)
        half = 1 << bits - 1
        if found.min() < -half or found.max() >= half:
            raise module.fail(word, f"has values beyond {bits} bits")
        return found.expand(shape)
    packed = module.take(word, ("I32",), (-(-out_features * bits // 32), groups))
    found = packed.t().contiguous().view(torch.uint8)
    found = found if bits == 8 else unpack_nibbles(found)
    return found[:, :out_features].t().int() - (1 << bits - 1)


def _expect_no_zero_points(module: Module, bits: int) -> None:
    """A file may bring those of a symmetric weight, if they move nothing. Raises ModelError."""
    if not module.has(ZERO):
        return
    header = module.header(ZERO)
    raw = module.read(f"{module.name}.{ZERO}", header).flatten().view(torch.uint8)
    middle = 0x88 if bits == 4 else 0x80  # of packed ones
    if raw.any() and not (header.dtype == "I32" and (raw == middle).all()):
        raise module.fail(ZERO, "is not zero, but the config has symmetric true")


def read_int8(module: Module, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """Integers of a byte each."""
    expect_type(module, "weight", scheme, "int", (4, 8))
    codes = module.take("weight", ("I8",), shape)
    scales, group = read_scales(module, SCALE, scheme, shape, FLOATS)
    zeros = _zero_points(module, scheme, (shape[0], scales.shape[1]))
    minimums = -zeros.float() * scales.float() if zeros.any() else None
    weight = QuantizedWeight
    return build(
        module,
        SCALE,
        lambda: weight("int8", codes, scales, group, minimums, activations=scheme.activations),
    )


def read_fp8(module: Module, scheme: Scheme, word: str, shape: tuple[int, int]) -> QuantizedWeight:
    """E4M3 codes; scales that are floats, or bytes that are powers of two (MXFP8)."""
    expect_type(module, "weight", scheme, "float", (8,))
    codes = module.fp8("weight", module.take("weight", ("F8_E4M3",), shape))
    if module.header(word).dtype in ("U8", "F8_E8M0"):
        scales, group = read_powers(module, word, shape, 32)
    else:
        scales, group = read_scales(module, word, scheme, shape, FLOATS)
    weight = QuantizedWeight
    return build(
        module,
        word,
        lambda: weight("fp8_e4m3", codes, scales, group, activations=scheme.activations),
    )


def read_fp4(module: Module, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """E2M1 codes: NVFP4 with a factor for the tensor, or MXFP4."""
    out_features, in_features = shape
    expect_type(module, PACKED, scheme, "float", (4,))
    if in_features % 2:
        raise module.fail(PACKED, f"has {in_features} inputs, an odd number")
    codes = module.take(PACKED, ("U8",), (out_features, in_features // 2))
    row_scales = None
    if module.header(SCALE).dtype in ("U8", "F8_E8M0"):
        scales, group = read_powers(module, SCALE, shape, 32)
    else:
        scales, group = read_scales(module, SCALE, scheme, shape, ("F8_E4M3",))
        word = "weight_global_scale"
        factor = module.finite(word, module.take(word, ("F32",), (1,), ())).reshape(1)
        if factor <= 0:
            raise module.fail(word, f"is {factor.item()}; expected a positive number")
        row_scales = module.finite(word, 1 / factor).expand(out_features).contiguous()
    weight = QuantizedWeight
    return build(
        module,
        SCALE,
        lambda: weight(
            "fp4_e2m1",
            codes,
            scales,
            group,
            row_scales=row_scales,
            activations=scheme.activations,
        ),
    )


def read_scales(
    module: Module, word: str, scheme: Scheme, shape: tuple[int, int], dtypes: tuple[str, ...]
) -> tuple[Tensor, int]:
    """Scales as [out, in / group], and the group. Raises ModelError."""
    out_features, in_features = shape
    if scheme.block is not None:
        rows, columns = scheme.block
        _expect_divides(module, word, in_features, columns)
        found = (-(-out_features // rows), in_features // columns)
        scales = module.finite(word, module.take(word, dtypes, found))
        scales = scales.repeat_interleave(min(rows, out_features), dim=0)
        return scales[:out_features].contiguous(), columns
    if scheme.group not in (None, -1):
        _expect_divides(module, word, in_features, scheme.group)
        found = (out_features, in_features // scheme.group)
        return module.finite(word, module.take(word, dtypes, found)), scheme.group
    shapes = ((out_features, 1), (out_features,), (1,), (), (1, 1))
    scales = module.finite(word, module.take(word, dtypes, *shapes))
    return scales.reshape(-1, 1).expand(out_features, 1).contiguous(), in_features


def read_powers(
    module: Module, word: str, shape: tuple[int, int], group: int
) -> tuple[Tensor, int]:
    """Exponents of two, [out, in / group] E8M0, in which 255 is not a number."""
    _expect_divides(module, word, shape[1], group)
    scales = module.take(word, ("U8", "F8_E8M0"), (shape[0], shape[1] // group))
    scales = scales.view(torch.float8_e8m0fnu)
    return module.finite(word, scales), group


def _expect_divides(module: Module, word: str, in_features: int, group: int) -> None:
    if in_features % group:
        problem = f"is for groups of {group} inputs, which do not divide {in_features}"
        raise module.fail(word, problem)


def expect_type(
    module: Module, word: str, scheme: Scheme, type_: str, bits: tuple[int, ...]
) -> None:
    """Codes are of the type that the config has. Raises ModelError."""
    if scheme.type != type_ or scheme.bits not in bits:
        found = module.header(word)
        raise ModelError(
            f"{found.path}: {module.name:.120}.{word} is {found.dtype}, but the config has"
            f" {scheme.type} of {scheme.bits} bits"
        )
