"""What is known of one transfer on the receiver's side, and what became of it."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Fetched:
    """The end of a transfer. num_blocks: how many of the fetch's blocks, from its first, are whole in all
    layers; 0 with an error. times: seconds of `time.monotonic` by what happened: requested, ready (the
    first piece was), computed (the last was), fetch (`fetch` was called), ended; those that happened;
    and `copying`: how many seconds of it were spent on copies."""

    transfer_id: str
    num_blocks: int
    error: str | None
    times: dict[str, float] = field(default_factory=dict)


@dataclass(eq=False)
class Transfer:
    """A prompt's blocks are counted from its first; `done` counts from the fetch's first."""

    id: str
    num_layers: int
    num_blocks: int  # asked for
    remote: list[int] = field(default_factory=list)  # the sender's blocks, as far as told
    counts: list[int] = field(
        default_factory=list
    )  # per layer: leading blocks that are final there
    computed: int | None = None  # blocks that are final in all layers; no more will be
    first: int = 0
    local: list[int] | None = None  # None: no fetch yet
    done: list[int] = field(default_factory=list)  # per layer: blocks that are written
    asked: bool = False  # the sender sends (tcp)
    checks: bool = False  # the sender has been asked whether it held the blocks
    progress: float = 0.0  # when it last came nearer to its end
    renewed: float = 0.0
    copying: float = 0.0  # seconds
    times: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts, self.done = [0] * self.num_layers, [0] * self.num_layers
        self.progress = self.renewed = time.monotonic()
        self.note("requested")

    def note(self, what: str) -> None:
        self.times.setdefault(what, time.monotonic())

    def heard(
        self, new_blocks: Sequence[int], layers: Sequence[int], counts: Sequence[int]
    ) -> None:
        """The sender has more. Raises ValueError for what cannot be."""
        if len(layers) != len(counts) or any(layer >= self.num_layers for layer in layers):
            raise ValueError(f"layers {layers} and counts {counts} of {self.num_layers} layers")
        if len(self.remote) + len(new_blocks) > self.num_blocks:
            raise ValueError(f"more than {self.num_blocks} blocks")
        self.remote += new_blocks
        for layer, count in zip(layers, counts, strict=True):
            if count > len(self.remote):
                raise ValueError(f"{count} blocks are ready of {len(self.remote)}")
            self.counts[layer] = max(self.counts[layer], count)
        self.note("ready")
        self.progress = time.monotonic()

    def heard_computed(self, num_blocks: int) -> None:
        """Raises ValueError for what cannot be."""
        if self.computed is not None or num_blocks > len(self.remote):
            raise ValueError(f"{num_blocks} blocks are computed of {len(self.remote)}")
        self.computed = num_blocks
        self.note("computed")
        self.progress = time.monotonic()

    def available(self, layer: int) -> int:
        """How many of the fetch's blocks are final in this layer."""
        assert self.local is not None
        return max(0, min(self.counts[layer] - self.first, len(self.local)))

    def written(self, layer: int, count: int) -> None:
        """Of the fetch's blocks the first `count` are there."""
        self.done[layer] = count
        self.progress = time.monotonic()

    @property
    def wanted(self) -> int | None:
        """How many blocks the fetch will have at its end; None: not known yet."""
        if self.local is None:
            return None
        if self.computed is not None:
            return max(0, min(self.computed - self.first, len(self.local)))
        return len(self.local)

    @property
    def is_whole(self) -> bool:
        """All that there is to fetch is there."""
        return self.wanted is not None and min(self.done) >= self.wanted

    def result(self, error: str | None) -> Fetched:
        self.note("ended")
        times = {**self.times, "copying": self.copying}
        return Fetched(self.id, (self.wanted or 0) if error is None else 0, error, times)
