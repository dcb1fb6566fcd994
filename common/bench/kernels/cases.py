"""The operations that `bench kernels` measures: shapes, inputs, and the work that is unavoidable.

SmolLM2-135M's shapes in float32 on a CPU, Qwen3-8B's in bfloat16 on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from common.kernels import Ops
    from common.kernels.quantized import QuantizedWeight

COPIES_BYTES = 256 << 20  # of weights or KV, taken in turn, as a model's layers are
FILTERS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
}

# Of quantised weights: the kind of codes, inputs that share a scale (0: all), the scales' dtype.
FORMATS = {
    "int8": ("int8", 0, "float32"),
    "int8-g32": ("int8", 32, "float16"),
    "int4-g32": ("int4", 32, "float16"),
    "int4-g64": ("int4", 64, "float16"),
    "fp8": ("fp8_e4m3", 0, "float32"),
    "mxfp8": ("fp8_e4m3", 32, "float8_e8m0fnu"),
    "mxfp4": ("fp4_e2m1", 32, "float8_e8m0fnu"),
    "nvfp4": ("fp4_e2m1", 16, "float8_e4m3fn"),
    "nf4": ("nf4", 64, "float32"),
}


@dataclass(frozen=True)
class Shape:
    """One model's sizes, and for how many tokens or sequences to measure."""

    name: str
    hidden: int
    intermediate: int
    vocab: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    linear_tokens: tuple[int, ...]
    attentions: tuple[tuple[int, int, int], ...]  # sequences, queries and tokens of each
    small_tokens: tuple[int, ...]
    rows: tuple[int, ...]  # of logits

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(out_features, in_features), the output's last."""
        heads = self.num_heads * self.head_dim
        return [
            (self.qkv, self.hidden),
            (self.hidden, heads),
            (2 * self.intermediate, self.hidden),
            (self.hidden, self.intermediate),
            (self.vocab, self.hidden),
        ]


SHAPES = {
    "cpu": Shape(
        "smollm2-135m", 576, 1536, 49152, 9, 3, 64,
        (1, 4, 16, 32, 128, 512),
        ((1, 1, 128), (1, 1, 1024), (16, 1, 128), (16, 1, 512), (1, 128, 128), (1, 512, 512)),
        (1, 16, 512),
        (1, 16),
    ),
    "cuda": Shape(
        "qwen3-8b", 4096, 12288, 151936, 32, 8, 128,
        (1, 16, 64, 256, 2048),
        ((1, 1, 4096), (64, 1, 4096), (256, 1, 512), (64, 5, 2048), (1, 2048, 2048)),
        (1, 64, 2048),
        (1, 64),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One operation at one shape. `make` builds inputs for an implementation and returns the call,
    which takes the number of the run; None where the implementation does not take the case."""

    op: str
    shape: str
    num_bytes: float
    num_flops: float
    make: Callable[["Ops"], Callable[[int], object] | None]


class Maker:
    """Makes the cases of one shape, on one device, in one number format."""

    def __init__(self, shape: Shape, device: str, dtype: "torch.dtype") -> None:
        self.shape, self.dtype, self.size = shape, dtype, dtype.itemsize
        self.like, self.on = {"device": device, "dtype": dtype}, {"device": device}

    def all_cases(self) -> list[Case]:
        shape = self.shape
        return [
            *(
                self.linear(num_tokens, *sizes)
                for sizes in shape.linears
                for num_tokens in shape.linear_tokens
                if sizes[0] < shape.vocab or num_tokens <= 64
            ),
            *(
                self.quantized(name, num_tokens, *shape.linears[2])
                for name in FORMATS
                for num_tokens in shape.linear_tokens
            ),
            *(self.attention(*sizes) for sizes in shape.attentions),
            *(case for num_tokens in shape.small_tokens for case in self.small(num_tokens)),
            *(
                self.sample(name, num_rows, params)
                for num_rows in shape.rows
                for name, params in FILTERS.items()
            ),
        ]

    def linear(self, num_tokens: int, out_features: int, in_features: int) -> Case:
        num_bytes = self.size * out_features * in_features

        def make(ops: "Ops") -> Callable[[int], object]:
            import torch

            x = torch.randn(num_tokens, in_features, **self.like)
            weights = [
                ops.prepare_weight(torch.randn(out_features, in_features, **self.like))
                for _ in range(max(1, min(40, COPIES_BYTES // num_bytes)))
            ]
            return lambda i: ops.linear(x, weights[i % len(weights)])

        name = f"{num_tokens} x {out_features} x {in_features}"
        total = num_bytes + self.size * num_tokens * (in_features + out_features)
        return Case("linear", name, total, 2 * num_tokens * out_features * in_features, make)

    def quantized(self, name: str, num_tokens: int, out_features: int, in_features: int) -> Case:
        """A linear layer with weights in a format, inputs as they are."""
        sizes = name, out_features, in_features
        num_bytes = random_weight(*sizes, {"device": "meta"}).nbytes

        def make(ops: "Ops") -> Callable[[int], object]:
            import torch

            x = torch.randn(num_tokens, in_features, **self.like)
            count = max(1, min(40, COPIES_BYTES // num_bytes))
            weights = [ops.prepare_weight(random_weight(*sizes, self.on)) for _ in range(count)]
            return lambda i: ops.linear(x, weights[i % count])

        shape = f"{name}, {num_tokens} x {out_features} x {in_features}"
        total = num_bytes + self.size * num_tokens * (in_features + out_features)
        flops = 2 * num_tokens * out_features * in_features
        return Case("quantized linear", shape, total, flops, make)

    def attention(self, num_seqs: int, num_queries: int, num_tokens: int) -> Case:
        """The queries are the last tokens; blocks lie in random order."""
        shape = self.shape
        heads = shape.num_heads * shape.head_dim
        kv_bytes = num_seqs * num_tokens * 2 * shape.num_kv_heads * shape.head_dim * self.size

        def make(ops: "Ops") -> Callable[[int], object] | None:
            import torch

            from common.kernels import AttentionMetadata

            block_size = ops.default_block_size
            try:
                ops.check_kv_cache(block_size, shape.head_dim, self.dtype)
            except ValueError:
                return None
            num_layers = max(1, min(30, COPIES_BYTES // kv_bytes))
            num_blocks = -(-num_tokens // block_size)
            blocks = torch.randperm(num_seqs * num_blocks, **self.on)
            sizes = (num_layers, 2, block_size, shape.num_kv_heads, shape.head_dim)
            kv_cache = torch.randn(len(blocks), *sizes, **self.like)
            query = torch.randn(
                num_seqs * num_queries, shape.num_heads, shape.head_dim, **self.like
            )
            starts = torch.arange(num_seqs + 1, dtype=torch.int32, **self.on) * num_queries
            metadata = AttentionMetadata(
                cu_seqlens_q=starts,
                seq_lens=torch.full_like(starts[1:], num_tokens),
                block_tables=blocks.view(num_seqs, num_blocks).int(),
                slot_mapping=starts.long(),
                max_query_len=num_queries,
                max_seq_len=num_tokens,
            )
            scale = shape.head_dim**-0.5
            return lambda i: ops.attention(query, kv_cache, i % num_layers, metadata, scale)

        # Each query sees the tokens up to itself.
        num_pairs = num_seqs * sum(num_tokens - i for i in range(num_queries))
        num_bytes = kv_bytes + 2 * num_seqs * num_queries * heads * self.size
        name = f"{num_seqs} x {num_queries} of {num_tokens}"
        return Case("attention", name, num_bytes, 4 * num_pairs * heads, make)

    def small(self, num_tokens: int) -> list[Case]:
        """What lies between the products."""
        shape = self.shape

        def norm(ops: "Ops") -> Callable[[int], object]:
            import torch

            x, residual = torch.randn(2, num_tokens, shape.hidden, **self.like)
            weight = torch.ones(shape.hidden, **self.like)
            return lambda i: ops.add_rms_norm(x, residual, weight, 1e-5)

        def silu(ops: "Ops") -> Callable[[int], object]:
            import torch

            gate_up = torch.randn(num_tokens, 2 * shape.intermediate, **self.like)
            return lambda i: ops.silu_and_mul(gate_up)

        def rotary(ops: "Ops") -> Callable[[int], object]:
            import torch

            sizes = (30, 2, 16, shape.num_kv_heads, shape.head_dim)
            kv_cache = torch.zeros(-(-num_tokens // 16), *sizes, **self.like)
            cos_sin = torch.rand(num_tokens, shape.head_dim, **self.on)
            slots = torch.arange(num_tokens, **self.on)
            qkv = torch.randn(num_tokens, shape.qkv, **self.like)
            return lambda i: ops.rotary_and_store(qkv, cos_sin, slots, kv_cache, i % 30, slots)

        name, each = f"{num_tokens} tokens", self.size * num_tokens
        return [
            Case("add_rms_norm", name, 4 * each * shape.hidden, 0, norm),
            Case("rotary_and_store", name, 2 * each * shape.qkv, 0, rotary),
            Case("silu_and_mul", name, 3 * each * shape.intermediate, 0, silu),
        ]

    def sample(self, name: str, num_rows: int, params: dict[str, float]) -> Case:
        vocab = self.shape.vocab

        def make(ops: "Ops") -> Callable[[int], object]:
            import torch

            logits = torch.randn(num_rows, vocab, **self.like) * 3
            ones = torch.ones(num_rows, **self.on)
            numbers = torch.arange(num_rows, **self.on)
            columns = (
                ones * params.get("temperature", 1.0),
                torch.full_like(numbers, int(params.get("top_k", 0))),
                ones * params.get("top_p", 1.0),
                ones * params.get("min_p", 0.0),
                numbers,
            )
            return lambda i: ops.sample(logits, *columns, numbers + i)

        shape = f"{num_rows} x {vocab}, {name}"
        return Case("sample", shape, self.size * num_rows * vocab, 0, make)


def random_weight(
    name: str, out_features: int, in_features: int, on: dict[str, str]
) -> "QuantizedWeight":
    """A weight in a format of FORMATS, its codes at random."""
    import torch

    from common.kernels.quantized import BYTES, QuantizedWeight

    kind, group, dtype = FORMATS[name]
    group = min(group or in_features, in_features)
    width = in_features if kind in BYTES else in_features // 2
    codes = torch.randint(256, (out_features, width), dtype=torch.uint8, **on)
    if kind in BYTES:
        codes = (codes & 0xBF).view(BYTES[kind])  # none of FP8's is NaN
    scales = torch.rand(out_features, in_features // group, **on) / 64 + 1 / 128
    row_scales = torch.ones(out_features, **on) if name == "nvfp4" else None
    scales = scales.to(getattr(torch, dtype))
    return QuantizedWeight(kind, codes, scales, group, row_scales=row_scales)
