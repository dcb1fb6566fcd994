"""The operations that `rooflines` measures: inputs for each, and how much work it cannot avoid."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from common.kernels import Ops

BLOCK_SIZE = 16
FILTERS = {
    "greedy": {"temperature": 0.0},
    "plain": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
}


@dataclass(frozen=True)
class Shape:
    """One model's sizes."""

    name: str
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int

    @property
    def qkv(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim

    @property
    def linears(self) -> list[tuple[str, int, int]]:
        """(name, out_features, in_features) of a layer's products, and of the output's."""
        heads = self.num_heads * self.head_dim
        return [
            ("qkv", self.qkv, self.hidden),
            ("o", self.hidden, heads),
            ("gate_up", 2 * self.intermediate, self.hidden),
            ("down", self.hidden, self.intermediate),
            ("lm_head", self.vocab, self.hidden),
        ]


@dataclass(frozen=True)
class Case:
    """One operation at one shape: what it must read and write, what it computes, and the call.

    under: a context to call it in.
    """

    name: str
    num_bytes: float
    num_flops: float
    make: Callable[[], Callable[[], object]]
    under: Callable[[], AbstractContextManager[None]] = nullcontext


class Maker:
    """Makes cases of one shape, on one device, in one number format."""

    def __init__(self, shape: Shape, device: "torch.device", dtype: "torch.dtype") -> None:
        self.shape, self.size = shape, dtype.itemsize
        self.like = {"device": device, "dtype": dtype}
        self.on = {"device": device}

    def linears(self, ops: "Ops", counts: tuple[int, ...]) -> list[Case]:
        """Products for so many tokens; the output's only for as many as decode together."""
        return [
            self.linear(ops, name, count, outs, ins)
            for name, outs, ins in self.shape.linears
            for count in counts
            if name != "lm_head" or count <= 256
        ]

    def linear(self, ops: "Ops", name: str, count: int, outs: int, ins: int) -> Case:
        def make() -> Callable[[], object]:
            import torch

            x = torch.randn(count, ins, **self.like)
            weight = ops.prepare_weight(torch.randn(outs, ins, **self.like))
            return lambda: ops.linear(x, weight)

        num_bytes = self.size * (outs * ins + count * (outs + ins))
        text = f"linear {name}, {count} x {outs} x {ins}"
        return Case(text, num_bytes, 2.0 * count * outs * ins, make)

    def attention(self, ops: "Ops", num_seqs: int, num_queries: int, num_tokens: int) -> Case:
        """Sequences of one length; the queries are the last tokens of each."""
        name = f"attention, {num_seqs} x {num_queries} of {num_tokens}"
        return self.attention_of(ops, name, [num_tokens] * num_seqs, num_queries)

    def attention_of(
        self, ops: "Ops", name: str, num_tokens: list[int], num_queries: int = 1
    ) -> Case:
        """Sequences of so many tokens each; blocks lie in random order."""
        shape, num_seqs = self.shape, len(num_tokens)

        def make() -> Callable[[], object]:
            import torch

            from common.kernels import AttentionMetadata

            counts = [-(-length // BLOCK_SIZE) for length in num_tokens]
            blocks = torch.randperm(sum(counts), **self.on).int().split(counts)
            tables = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True)
            sizes = (sum(counts), 1, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
            cache = torch.randn(sizes, **self.like)
            query = torch.randn(
                num_seqs * num_queries, shape.num_heads, shape.head_dim, **self.like
            )
            metadata = AttentionMetadata(
                cu_seqlens_q=torch.arange(num_seqs + 1, dtype=torch.int32, **self.on) * num_queries,
                seq_lens=torch.tensor(num_tokens, dtype=torch.int32, **self.on),
                block_tables=tables,
                slot_mapping=torch.arange(len(query), **self.on),
                max_query_len=num_queries,
                max_seq_len=max(num_tokens),
            )
            return lambda: ops.attention(query, cache, 0, metadata, shape.head_dim**-0.5)

        pairs = sum(length - i for length in num_tokens for i in range(num_queries))
        cached = 2 * sum(num_tokens) * shape.num_kv_heads * shape.head_dim
        queries = 2 * num_seqs * num_queries * shape.num_heads * shape.head_dim
        flops = 4.0 * pairs * shape.num_heads * shape.head_dim
        return Case(name, self.size * (cached + queries), flops, make)

    def sdpa(self, num_seqs: int, num_tokens: int) -> Case:
        """PyTorch's own attention over whole prompts, keys and values side by side."""
        ours = self.attention_of(None, "", [num_tokens] * num_seqs, num_tokens)

        def make() -> Callable[[], object]:
            import torch
            import torch.nn.functional as F

            shape = self.shape
            query = torch.randn(num_seqs, shape.num_heads, num_tokens, shape.head_dim, **self.like)
            sizes = (2, num_seqs, shape.num_kv_heads, num_tokens, shape.head_dim)
            key, value = torch.randn(sizes, **self.like)
            return lambda: F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

        name = f"PyTorch's attention, {num_seqs} x {num_tokens}"
        return Case(name, ours.num_bytes, ours.num_flops, make)

    def small(self, ops: "Ops", count: int) -> list[Case]:
        """What lies between the products, for so many tokens."""
        shape = self.shape

        def norm() -> Callable[[], object]:
            import torch

            x, residual = torch.randn(2, count, shape.hidden, **self.like)
            weight = torch.ones(shape.hidden, **self.like)
            return lambda: ops.add_rms_norm(x, residual, weight, 1e-6)

        def rotary() -> Callable[[], object]:
            import torch

            num_blocks = -(-count // BLOCK_SIZE)
            sizes = (num_blocks, 1, 2, BLOCK_SIZE, shape.num_kv_heads, shape.head_dim)
            cache = torch.zeros(sizes, **self.like)
            table = torch.rand(count, shape.head_dim, **self.on)
            slots = torch.arange(count, **self.on)
            qkv = torch.randn(count, shape.qkv, **self.like)
            norms = torch.ones(2, shape.head_dim, **self.like)
            return lambda: ops.rotary_and_store(qkv, table, slots, cache, 0, slots, *norms)

        def silu() -> Callable[[], object]:
            import torch

            gate_up = torch.randn(count, 2 * shape.intermediate, **self.like)
            return lambda: ops.silu_and_mul(gate_up)

        each = self.size * count
        return [
            Case(f"add_rms_norm, {count} tokens", 4 * each * shape.hidden, 0, norm),
            Case(f"rotary_and_store, {count} tokens", 2 * each * shape.qkv, 0, rotary),
            Case(f"silu_and_mul, {count} tokens", 3 * each * shape.intermediate, 0, silu),
        ]

    def experts(self, ops: "Ops", count: int, num_experts: int, k: int) -> Case:
        """A mixture of experts, `intermediate` wide each, for so many tokens that choose at random.
        What is read is the weights of those that any token chose."""
        hidden, size = self.shape.hidden, self.shape.intermediate

        def make() -> Callable[[], object]:
            import torch

            shapes = (2 * size, hidden), (hidden, size)
            own = [
                [torch.randn(shape, **self.like) for _ in range(num_experts)] for shape in shapes
            ]
            prepared = ops.prepare_experts(*own)
            x = torch.randn(count, hidden, **self.like)
            weights, ids = torch.rand(count, num_experts, **self.on).topk(k)
            return lambda: ops.experts(x, ids, weights, prepared)

        chosen = num_experts * (1 - (1 - k / num_experts) ** count)  # on average
        each = 3 * hidden * size
        num_bytes = self.size * (chosen * each + 2 * count * hidden)
        name = f"experts, {count} tokens, {k} of {num_experts}"
        return Case(name, num_bytes, 2.0 * count * k * each, make)

    def samplers(self, ops: "Ops", num_rows: int) -> list[Case]:
        return [
            Case(
                f"sample, {num_rows} x {self.shape.vocab}, {name}",
                self.size * num_rows * self.shape.vocab,
                0,
                lambda params=params: self.sampler(ops, num_rows, params),
            )
            for name, params in FILTERS.items()
        ]

    def sampler(self, ops: "Ops", num_rows: int, params: dict[str, float]) -> Callable[[], object]:
        import torch

        logits = torch.randn(num_rows, self.shape.vocab, **self.like) * 3
        ones, numbers = torch.ones(num_rows, **self.on), torch.arange(num_rows, **self.on)
        columns = (
            ones * params.get("temperature", 1.0),
            torch.full_like(numbers, int(params.get("top_k", 0))),
            ones * params.get("top_p", 1.0),
            ones * params.get("min_p", 0.0),
            numbers,
            numbers,
        )
        return lambda: ops.sample(logits, *columns)
