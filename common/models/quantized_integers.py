"""GPTQ's and AWQ's weights of 4 and 8 bits, out of 32-bit integers.

GPTQ packs along the inputs: `qweight` [in * bits / 32, out], the first input in the lowest bits. AWQ
packs along the outputs, [in, out / 8], and its nibbles hold the outputs 0, 2, 4, 6, 1, 3, 5, 7 of
eight. Both pack zero points along the outputs: `qzeros` [groups, out * bits / 32]. A weight is
(code - zero) * scale, `scales` [groups, out]. GPTQ's first format stores zero - 1. `g_idx` [in] is the
group of each input; with `desc_act` groups are not of neighbours.
"""

import sys

import torch
from torch import Tensor

from common.kernels.quantized import QuantizedWeight, pack_nibbles, unpack_nibbles
from common.models.errors import ModelError
from common.models.quantized_checks import FLOATS, Module, build
from common.models.quantized_config import Quantization, scheme_of

AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # the nibble of each of eight outputs

assert sys.byteorder == "little", "packed integers are read byte by byte, the lowest first"


def read_gptq(module: Module, config: Quantization, shape: tuple[int, int]) -> QuantizedWeight:
    """[out, in] of `qweight`, `qzeros`, `scales` and `g_idx`. Raises ModelError."""
    out_features, in_features = shape
    bits = _bits(module, config, in_features)
    groups, group = _groups(module, config, in_features)
    per_word = 32 // bits
    if out_features % per_word or in_features % per_word:
        raise module.fail("qweight", f"is of {list(shape)}, not of multiples of {per_word}")
    packed = module.take("qweight", ("I32",), (in_features // per_word, out_features))
    order = None
    if module.has("g_idx"):
        order = module.order("g_idx", groups, in_features)
    elif config.is_reordered:
        raise ModelError(f"the checkpoint lacks {module.name}.g_idx, although desc_act is true")
    packed_zeros = module.take("qzeros", ("I32",), (groups, out_features // per_word))
    zeros = _unpack(packed_zeros, bits).t().int() + config.zero_offset
    scales = module.finite("scales", module.take("scales", FLOATS, (groups, out_features)))
    scales = scales.t().contiguous()
    codes = packed.t().contiguous().view(torch.uint8)  # [out, in * bits / 8], the first input low
    parts = centred(reordered(codes, order, bits), zeros, scales, bits)
    return build(
        module, "scales", lambda: QuantizedWeight(*parts[:3], group, parts[3], order=order)
    )


def read_awq(module: Module, config: Quantization, shape: tuple[int, int]) -> QuantizedWeight:
    """[out, in] of `qweight`, `qzeros` and `scales`. Raises ModelError."""
    out_features, in_features = shape
    groups, group = _groups(module, config, in_features)
    if out_features % 8 or in_features % 2:
        raise module.fail("qweight", f"is of {list(shape)}, not of 8 outputs at a time")
    packed = module.take("qweight", ("I32",), (in_features, out_features // 8))
    packed_zeros = module.take("qzeros", ("I32",), (groups, out_features // 8))
    scales = module.finite("scales", module.take("scales", FLOATS, (groups, out_features)))
    codes = pack_nibbles(_in_awq_order(packed).t())
    zeros = _in_awq_order(packed_zeros).t().int()
    parts = centred(codes, zeros, scales.t().contiguous(), 4)
    return build(module, "scales", lambda: QuantizedWeight(*parts[:3], group, parts[3]))


def centred(
    codes: Tensor, zeros: Tensor, scales: Tensor, bits: int
) -> tuple[str, Tensor, Tensor, Tensor | None]:
    """Kind, codes, scales and minimums of (code - zero) * scale.

    codes: [out, in * bits / 8] uint8, packed. zeros, scales: [out, groups]. Zero points that are all
    in the middle need no minimums.
    """
    zeros = zeros.contiguous()
    if bits == 8:
        codes = (codes ^ 128).view(torch.int8)
        minimums = (128 - zeros).float() * scales.float()
        return "int8", codes, scales, minimums if (zeros != 128).any() else None
    if (zeros == 8).all():
        return "int4", codes, scales, None
    return "uint4", codes, scales, (-zeros).float() * scales.float()


def reordered(codes: Tensor, order: Tensor | None, bits: int) -> Tensor:
    """Packed codes, [out, in * bits / 8] uint8, with the inputs in another order."""
    if order is None:
        return codes
    return codes[:, order] if bits == 8 else pack_nibbles(unpack_nibbles(codes)[:, order])


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """[…, n] int32 to […, n * 32 / bits] uint8, the lowest bits first."""
    found = packed.contiguous().view(torch.uint8)
    return found if bits == 8 else unpack_nibbles(found)


def _in_awq_order(packed: Tensor) -> Tensor:
    nibbles = _unpack(packed, 4).unflatten(1, (-1, 8))
    return nibbles[:, :, list(AWQ_PLACES)].flatten(1)


def _bits(module: Module, config: Quantization, in_features: int) -> int:
    """Bits of a code, by the shape of `qweight`; as the config says unless modules may differ."""
    shape, wanted = module.header("qweight").shape, scheme_of(module.name, config).bits
    found = [bits for bits in (4, 8) if shape and shape[0] * 32 == in_features * bits]
    if not found or (found[0] != wanted and not config.varies):
        problem = f"is {list(shape)!s:.60}, not of {in_features} inputs of {wanted} bits"
        raise module.fail("qweight", problem)
    return found[0]


def _groups(module: Module, config: Quantization, in_features: int) -> tuple[int, int]:
    """Number and size of the groups of inputs, by the shape of `scales`, checked in the same way."""
    shape, wanted = module.header("scales").shape, scheme_of(module.name, config).group
    groups = shape[0] if len(shape) == 2 else 0
    group = in_features // groups if groups and in_features % groups == 0 else 0
    is_wanted = config.varies or group == (in_features if wanted == -1 else wanted)
    if not group or not is_wanted:
        raise module.fail(
            "scales", f"is {list(shape)!s:.60}, not of {in_features} inputs in groups of {wanted}"
        )
    return groups, group
