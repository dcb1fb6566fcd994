"""Which part of the model each rank has.

Tensor parallelism (Shoeybi et al., "Megatron-LM: Training Multi-Billion Parameter Language Models
Using Model Parallelism", arXiv 1909.08053): the first matrix of a pair is split by its outputs
(columns, as the paper writes them), the second by its inputs (rows). What lies between the two stays
on its rank, and the partial results are summed once, by one all-reduce. A layer has two such pairs:

    attention  q, k, v by whole groups of heads | attention of these heads | the output's inputs
    MLP        gate, up by features             | silu(gate) * up          | down's inputs

The embedding is split by tokens: each rank looks up its own, and has zeros for the others, whose sum
is the embedding. So is the head: each rank has the logits of its tokens, and rank 0 gathers them.

A query head needs its KV head on the same rank, so heads are dealt out in whole groups: 9 query and
3 KV heads make 6 and 2 on the first of two ranks, 3 and 1 on the other. Where ranks are more than KV
heads, a KV head lies on several ranks, each with some of its query heads.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from common.distributed.group import even_split
from common.models.architecture import ModelConfig


class Features(NamedTuple):
    """Rows or columns of a weight that are spread over the ranks."""

    total: int
    own: range


@dataclass(frozen=True)
class Shard:
    """What one rank has: which heads of every layer, features of every MLP, tokens of the
    vocabulary."""

    rank: int
    size: int
    heads: range
    kv_heads: range
    intermediate: range
    vocabularies: list[range]  # of every rank

    @classmethod
    def of(cls, config: ModelConfig, rank: int = 0, size: int = 1) -> "Shard":
        """Raises ValueError where the model cannot be divided so."""
        heads, kv_heads = divide_heads(config.num_heads, config.num_kv_heads, size)[rank]
        for name in ("intermediate_size", "vocab_size"):
            if getattr(config, name) < size:
                number = getattr(config, name)
                raise ValueError(f"tensor_parallel_size is {size}: the model's {name} is {number}")
        intermediate = even_split(config.intermediate_size, size)[rank]
        return cls(rank, size, heads, kv_heads, intermediate, even_split(config.vocab_size, size))

    @property
    def vocabulary(self) -> range:
        return self.vocabularies[self.rank]

    def local(self, config: ModelConfig) -> ModelConfig:
        """The model's shape as this rank's KV cache and kernels see it."""
        return replace(config, num_heads=len(self.heads), num_kv_heads=len(self.kv_heads))


def divide_heads(num_heads: int, num_kv_heads: int, size: int) -> list[tuple[range, range]]:
    """Each rank's query heads and KV heads. Raises ValueError.

    Up to as many ranks as KV heads, each rank has whole groups: some have one more where the ranks
    do not divide them. Beyond, each KV head is on equally many ranks, and so are its query heads.
    """
    group = num_heads // num_kv_heads
    if size <= num_kv_heads:
        shares = even_split(num_kv_heads, size)
        return [(range(kv.start * group, kv.stop * group), kv) for kv in shares]
    if size % num_kv_heads or num_heads % size:
        raise ValueError(
            f"tensor_parallel_size is {size}: {num_heads} query heads and {num_kv_heads} KV heads"
            f" cannot be divided so; up to {num_kv_heads} ranks can, and multiples of"
            f" {num_kv_heads} that divide {num_heads}"
        )
    copies, own = size // num_kv_heads, num_heads // size
    kv_heads = [range(rank // copies, rank // copies + 1) for rank in range(size)]
    return [(range(rank * own, (rank + 1) * own), kv_heads[rank]) for rank in range(size)]


def elements(heads: range, head_dim: int, num_heads: int) -> Features:
    """Heads as rows of a projection."""
    return Features(num_heads * head_dim, range(heads.start * head_dim, heads.stop * head_dim))
