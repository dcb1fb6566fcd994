"""How a model is laid out over ranks: which share of it is on each rank, and what fits beside.

`tp` ranks hold one replica together: heads, the columns of the feed-forward network and the
vocabulary are divided. `dp` replicas have sequences of their own. With `ep` the experts of a mixture
are spread over all tp * dp ranks; without it each replica has them all, cut in columns like any
feed-forward network. With `pp` a replica has so many stages of layers, each of them on tp ranks.
"""

from dataclasses import dataclass, replace

from common.bench.costs import ModelShape
from common.bench.parallel.machines import Machine
from common.distributed.group import even_split

USABLE_MEMORY = 0.9  # of a device, for weights and KV; the rest is activations and the libraries'
BACKENDS = ("all_to_all", "allgather_reducescatter")


@dataclass(frozen=True)
class Layout:
    """How many ranks share a replica, how many replicas there are, and whether experts are spread.

    backend: how tokens get to the experts, one of BACKENDS; with ep.
    """

    tp: int = 1
    dp: int = 1
    ep: bool = False
    backend: str = "all_to_all"
    pp: int = 1

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(f"backend {self.backend!r} is none of {', '.join(BACKENDS)}")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.dp * self.pp

    @property
    def stage(self) -> "Layout":
        """Of the layers of one stage."""
        return self if self.pp == 1 else replace(self, pp=1)

    @property
    def name(self) -> str:
        stages = f" × PP {self.pp}" if self.pp > 1 else ""
        return f"TP {self.tp} × DP {self.dp}{stages}" + (", EP" if self.ep else "")


@dataclass(frozen=True)
class Share:
    """What of a model is on one rank. Sizes in elements, of one layer."""

    num_heads: int
    num_kv_heads: int
    intermediate_size: int  # of a dense network, or of each expert
    num_experts: int  # 0 in a dense model
    vocab_size: int

    @classmethod
    def of(cls, shape: ModelShape, layout: Layout, rank: int = 0) -> "Share":
        """rank: of a replica; the first has most. Heads go in whole groups that share keys and
        values; more ranks than groups copy these. Raises ValueError for what does not divide."""
        groups, tp = shape.num_kv_heads, layout.tp
        if tp > groups and (tp % groups or shape.num_heads % tp):
            raise ValueError(f"tp {tp}: {shape.num_heads} heads with {groups} of KV do not divide")
        spread = layout.num_ranks if layout.ep and shape.num_experts else 1
        if shape.num_experts % spread:
            raise ValueError(f"{shape.num_experts} experts on {spread} ranks: it does not divide")

        def part(total: int, size: int) -> int:
            return len(even_split(total, size)[rank])

        own_groups = part(groups, tp) if tp <= groups else 1
        whole_groups = own_groups * (shape.num_heads // groups)
        cut = shape.intermediate_size
        return cls(
            num_heads=whole_groups if tp <= groups else shape.num_heads // tp,
            num_kv_heads=own_groups,
            intermediate_size=cut if spread > 1 else part(cut, tp),
            num_experts=shape.num_experts // spread,
            vocab_size=part(shape.vocab_size, tp),
        )

    def projection_params(self, shape: ModelShape) -> int:
        """Query, key, value and output matrix of one layer."""
        return 2 * (self.num_heads + self.num_kv_heads) * shape.head_dim * shape.hidden_size

    def network_params(self, shape: ModelShape) -> int:
        """Gate, up and down matrix of one layer, or of one expert."""
        return 3 * self.intermediate_size * shape.hidden_size


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank, and how many sequences all replicas would hold if all ranks were like it."""

    weight_bytes: int
    kv_bytes_per_token: int
    num_sequences: int


def memory(
    shape: ModelShape,
    layout: Layout,
    machine: Machine,
    context: int,
    dtype_bytes: int = 2,
    tied: bool = False,
    rank: int = 0,
) -> Memory:
    """context: tokens of a sequence. tied: the output matrix is the embedding's and there once.
    rank: the first has most, but for the output matrix of the last stage.

    Biases and norms of queries and keys are left out: below a millionth.
    """
    stage, place = divmod(rank, layout.tp)
    is_first, is_last = stage == 0, stage == layout.pp - 1
    shape = replace(shape, num_layers=len(even_split(shape.num_layers, layout.pp)[stage]))
    own, layers = Share.of(shape, layout.stage, place), shape.num_layers
    networks = own.network_params(shape) * max(1, own.num_experts)
    whole = (2 * layers + is_last) * shape.hidden_size + shape.router_params  # on every rank
    matrices = max(is_first, is_last) if tied else is_first + is_last
    vocabulary = matrices * own.vocab_size * shape.hidden_size
    params = layers * (own.projection_params(shape) + networks) + whole + vocabulary
    token_bytes = 2 * layers * own.num_kv_heads * shape.head_dim * dtype_bytes
    room = USABLE_MEMORY * machine.device.memory_bytes - params * dtype_bytes
    fitting = max(0, int(room // (context * token_bytes)))
    return Memory(params * dtype_bytes, token_bytes, layout.dp * fitting)


def layouts(
    shape: ModelShape, machine: Machine, num_ranks: int | None = None, num_stages: int = 1
) -> list[Layout]:
    """All that use num_ranks (all of the machine's) and that the model can have, of replicas with so
    many stages."""
    total = (num_ranks or machine.num_ranks) // num_stages
    found = []
    for tp in (size for size in range(1, total + 1) if total % size == 0):
        for ep in (False, True) if shape.num_experts else (False,):
            layout = Layout(tp, total // tp, ep, pp=num_stages)
            try:
                Share.of(shape, layout.stage)
                machine.fabric.hosts(tp)
            except ValueError:
                continue
            found.append(layout)
    return found
