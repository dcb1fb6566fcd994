"""GGUF's tensors as weights, under Hugging Face's names.

A block is of 32 inputs: a float16 scale, for Q4_1 a float16 minimum, then the codes. Nibbles lie in
halves: byte j of a block has input j low and input j + 16 high. llama.cpp keeps the rows of q and k
so that the two halves of a rotary pair are neighbours; here they are half a head apart.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from common.kernels.quantized import QuantizedWeight, pack_nibbles, unpack_nibbles
from common.models.errors import ModelError
from common.models.gguf_header import GGUFHeader, GGUFTensor

BLOCK = 32
WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
ROTARY = ("attn_q", "attn_k")


def model_name(name: str) -> str | None:
    """A tensor's name in Hugging Face's Llama; None where it has no such weight."""
    match = re.fullmatch(r"blk\.(\d{1,6})\.(\w+)\.weight", name)
    if match is None or match[2] not in OF_A_LAYER:
        return WHOLE.get(name)
    return f"model.layers.{match[1]}.{OF_A_LAYER[match[2]]}.weight"


def check_tensors(header: GGUFHeader) -> None:
    """All of it can be read. Raises ModelError naming the tensor and its type."""
    for name, tensor in header.tensors.items():
        if model_name(name) is None:
            raise ModelError(
                f"{header.path} has the tensor {name!r:.120}, which Llama here has not"
            )
        is_matrix = len(tensor.shape) == 2
        if tensor.type not in (*PLAIN, "Q4_0", "Q4_1", "Q8_0") or not (
            is_matrix or tensor.type in PLAIN
        ):
            raise ModelError(
                f"{header.path} has {name!r:.120} as {tensor.type} {list(tensor.shape)}; of quantised"
                " tensors matrices of Q4_0, Q4_1 and Q8_0 are read"
            )


def gguf_weights(
    header: GGUFHeader, heads: int, kv_heads: int
) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
    """(name in Hugging Face's Llama, weight), one at a time. Call `check_tensors` first.

    Raises ModelError.
    """
    try:
        file = header.path.open("rb")
    except OSError as error:
        raise ModelError(f"{header.path} cannot be read: {error.strerror}") from error
    with file:
        yield from _weights(file, header, heads, kv_heads)


def _weights(
    file: BinaryIO, header: GGUFHeader, heads: int, kv_heads: int
) -> Iterator[tuple[str, QuantizedWeight | Tensor]]:
    for name, tensor in header.tensors.items():
        weight = read_tensor(file, header.path, tensor)
        kind = name.split(".")[-2]
        if kind in ROTARY:
            rows = rotary_rows(header, tensor, heads if kind == "attn_q" else kv_heads)
            weight = weight[rows] if isinstance(weight, Tensor) else weight.rows(rows)
        found = model_name(name)
        assert found is not None, name
        yield found, weight


def rotary_rows(header: GGUFHeader, tensor: GGUFTensor, heads: int) -> Tensor:
    """For each row of Hugging Face's the row of llama.cpp's. Raises ModelError."""
    size = tensor.shape[0]
    if heads < 1 or size % (2 * heads):
        raise ModelError(f"{header.path} has {tensor.name!r} of {size} rows for {heads} heads")
    return torch.arange(size).view(heads, -1, 2).transpose(1, 2).flatten()


def read_tensor(file: BinaryIO, path: Path, tensor: GGUFTensor) -> QuantizedWeight | Tensor:
    """A matrix of blocks as codes and scales; others in their floats. Raises ModelError."""
    try:
        file.seek(tensor.begin)
        data = bytearray(file.read(tensor.end - tensor.begin))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) != tensor.end - tensor.begin:
        raise ModelError(f"{path} ends within {tensor.name!r:.120}")
    if tensor.type in PLAIN:
        return torch.frombuffer(data, dtype=PLAIN[tensor.type]).view(tensor.shape)
    out_features, in_features = tensor.shape
    blocks = torch.frombuffer(data, dtype=torch.uint8).view(out_features, in_features // BLOCK, -1)
    scales = _halves(blocks, 0, path, tensor)
    if tensor.type == "Q8_0":
        codes = blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1)
        return QuantizedWeight("int8", codes, scales, BLOCK)
    if tensor.type == "Q4_0":
        return QuantizedWeight("int4", _nibbles(blocks[:, :, 2:]), scales, BLOCK)
    minimums = _halves(blocks, 2, path, tensor)
    return QuantizedWeight("uint4", _nibbles(blocks[:, :, 4:]), scales, BLOCK, minimums)


def _halves(blocks: Tensor, place: int, path: Path, tensor: GGUFTensor) -> Tensor:
    """The float16 at a place of each block, [out, in / 32]. Raises ModelError."""
    found = blocks[:, :, place : place + 2].contiguous().view(torch.float16).squeeze(2)
    if not found.isfinite().all():
        bad = found[~found.isfinite()][0].item()
        raise ModelError(f"{path}: {tensor.name!r:.120} has the scale {bad}")
    return found


def _nibbles(packed: Tensor) -> Tensor:
    """[out, in / 32, 16] in halves to [out, in / 2] with the even input low."""
    halves = unpack_nibbles(packed).unflatten(2, (16, 2))
    return pack_nibbles(halves.transpose(2, 3).flatten(1))
