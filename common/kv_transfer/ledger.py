"""What a sender owes: its transfers, between the engine that computes and the thread that talks to peers.

| state | begins with | blocks |
|---|---|---|
| computing | a peer's Prefill | the sequence's own |
| computed | `finish`: the lease begins | held for the peer |
| ended | fetched, cancelled, failed, expired (lease), lost (peer) | in `released`, once |
"""

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from common.kv_transfer import messages as m
from common.kv_transfer.connection import Connection

MAX_TRANSFERS = 4096  # of one connection
CHANGED = "the prompt has lost its blocks while it was computed"


@dataclass(eq=False)
class Transfer:
    """What has been computed and told of one request."""

    id: str
    connection: Connection
    num_blocks: int  # that the peer may ask for
    counts: list[int]  # per layer: leading blocks that are final
    told: list[int]  # the same, as the peer knows it
    sent: list[int]  # per layer: blocks of the pull that have been sent
    blocks: list[int] = field(default_factory=list)
    told_blocks: int = 0
    computed: int | None = None  # blocks in all; None: there may be more to come
    told_computed: bool = False
    checks: bool = False  # the peer has asked whether its blocks were held
    pull: tuple[int, int] | None = None  # first, count
    deadline: float | None = None


class Ledger:
    """Any thread may call; nothing here waits."""

    def __init__(self, num_layers: int, num_blocks: int, lease: float) -> None:
        self._num_layers, self._num_blocks, self._lease = num_layers, num_blocks, lease
        self._lock = threading.Lock()
        self._transfers: dict[str, Transfer] = {}
        self._news: dict[str, Transfer] = {}  # the peer does not know all of theirs
        self._failed: list[tuple[Transfer, str]] = []  # nor of these
        self._events: list[tuple[Any, Transfer, int, int]] = []  # not final before they happen
        self._released: list[str] = []
        self._has_released = threading.Event()
        self._outcomes: Counter[str] = Counter()

    # The engine's.

    def ready(
        self, transfer_id: str, blocks: list[int], layer: int, num_blocks: int, event: Any
    ) -> None:
        """event: a GPU's, before which nothing is final; None: it is now."""
        assert 0 <= layer < self._num_layers, f"layer {layer} of {self._num_layers}"
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.computed is not None:
                return
            known = len(transfer.blocks)
            if blocks[:known] != transfer.blocks:
                self._fail(transfer, CHANGED)
                return
            transfer.blocks += blocks[known:]
            if event is not None:
                self._events.append((event, transfer, layer, num_blocks))
            else:
                self._count(transfer, layer, num_blocks)

    def finish(self, transfer_id: str, num_blocks: int) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is None or transfer.computed is not None:
                return
            transfer.computed = min(num_blocks, len(transfer.blocks), transfer.num_blocks)
            transfer.counts = [max(n, transfer.computed) for n in transfer.counts]
            transfer.deadline = time.monotonic() + self._lease
            self._news[transfer_id] = transfer

    def fail(self, transfer_id: str, reason: str) -> None:
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            if transfer is not None:
                self._fail(transfer, reason)

    def released(self) -> list[str]:
        with self._lock:
            self._has_released.clear()
            ended, self._released = self._released, []
        return ended

    def wait(self, seconds: float) -> bool:
        return self._has_released.wait(seconds)

    def stats(self) -> dict[str, float]:
        with self._lock:
            ended = {f"ended_{k}": float(v) for k, v in sorted(self._outcomes.items())}
            return {"transfers": float(len(self._transfers)), **ended}

    # The talking thread's.

    def begin(self, connection: Connection, message: m.Prefill) -> str | None:
        """A new transfer; or why there is none."""
        with self._lock:
            if message.transfer_id in self._transfers:
                return "its id is in use"
            if not 0 < message.num_blocks <= self._num_blocks:
                return f"num_blocks is {message.num_blocks}, the pool has {self._num_blocks}"
            if not message.token_ids:
                return "token_ids is empty"
            if sum(t.connection is connection for t in self._transfers.values()) >= MAX_TRANSFERS:
                return f"there are {MAX_TRANSFERS} transfers on this connection"
            zeros = ([0] * self._num_layers for _ in range(3))
            transfer = Transfer(message.transfer_id, connection, message.num_blocks, *zeros)
            self._transfers[transfer.id] = transfer
        return None

    def find(self, connection: Connection, transfer_id: str) -> Transfer | None:
        """A connection's own."""
        with self._lock:
            transfer = self._transfers.get(transfer_id)
            return transfer if transfer and transfer.connection is connection else None

    def of(self, connection: Connection) -> list[Transfer]:
        with self._lock:
            return [t for t in self._transfers.values() if t.connection is connection]

    def end(self, transfer: Transfer, outcome: str) -> bool:
        """Whether its prompt is being computed for nothing."""
        with self._lock:
            return self._transfers.get(transfer.id) is transfer and self._end(transfer, outcome)

    def renew(self, transfer: Transfer) -> None:
        """The peer still reads."""
        with self._lock:
            if transfer.deadline is not None:
                transfer.deadline = time.monotonic() + self._lease

    def check(self, transfer: Transfer) -> None:
        """The peer has read all it wants, and asks whether the blocks were held."""
        with self._lock:
            if self._transfers.get(transfer.id) is transfer:
                transfer.checks = True
                self._news[transfer.id] = transfer

    def news(self) -> list[tuple[Connection, m.Message]]:
        """What peers do not know yet. Ends the transfers whose lease is over."""
        now = time.monotonic()
        with self._lock:
            self._take_events()
            for transfer in list(self._transfers.values()):
                if transfer.deadline is not None and transfer.deadline <= now:
                    self._end(transfer, "expired")
                    reason = f"the lease of {self._lease:g} s is over"
                    self._failed.append((transfer, reason))
            told: list[tuple[Connection, m.Message]] = []
            for transfer, reason in self._failed:
                told.append((transfer.connection, m.Failed(transfer.id, reason[:1000])))
            self._failed = []
            for transfer in list(self._news.values()):
                told += [(transfer.connection, message) for message in self._news_of(transfer)]
            self._news = {}
        return told

    def seconds_left(self) -> float:
        """Until `news` should be asked for again, at most 1."""
        now = time.monotonic()
        with self._lock:
            if self._events:
                return 0.0005
            deadlines = [t.deadline for t in self._transfers.values() if t.deadline is not None]
        return max(0.0, min([1.0, *(deadline - now for deadline in deadlines)]))

    # With the lock held.

    def _count(self, transfer: Transfer, layer: int, num_blocks: int) -> None:
        num_blocks = min(num_blocks, len(transfer.blocks), transfer.num_blocks)
        if num_blocks > transfer.counts[layer]:
            transfer.counts[layer] = num_blocks
            self._news[transfer.id] = transfer

    def _take_events(self) -> None:
        while self._events and self._events[0][0].query():
            _, transfer, layer, num_blocks = self._events.pop(0)
            if self._transfers.get(transfer.id) is transfer:
                self._count(transfer, layer, num_blocks)

    def _fail(self, transfer: Transfer, reason: str) -> None:
        self._end(transfer, "failed")
        self._failed.append((transfer, reason))

    def _end(self, transfer: Transfer, outcome: str) -> bool:
        del self._transfers[transfer.id]
        self._news.pop(transfer.id, None)
        self._released.append(transfer.id)
        self._has_released.set()
        self._outcomes[outcome] += 1
        return transfer.computed is None

    def _news_of(self, transfer: Transfer) -> list[m.Message]:
        told: list[m.Message] = []
        layers = [i for i, n in enumerate(transfer.counts) if n > transfer.told[i]]
        if layers:
            blocks = transfer.blocks[transfer.told_blocks : transfer.num_blocks]
            counts = [transfer.counts[i] for i in layers]
            told.append(m.Ready(transfer.id, blocks, layers, counts))
            transfer.told_blocks += len(blocks)
            transfer.told = list(transfer.counts)
        if transfer.computed is not None and not transfer.told_computed:
            transfer.told_computed = True
            told.append(m.Computed(transfer.id, transfer.computed))
        if transfer.computed is not None and transfer.checks:
            self._end(transfer, "fetched")
            told.append(m.Held(transfer.id))
        return told
