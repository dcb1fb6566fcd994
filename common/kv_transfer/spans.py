"""Which pieces of a transfer a receiver reads next."""

from typing import NamedTuple

import numpy as np

from common.kv_transfer.fetching import Transfer
from common.kv_transfer.layout import Layout

TURN_BYTES = 16 << 20  # read before the thread looks at its sockets again: some milliseconds


class Span(NamedTuple):
    """Blocks [begin, end) of a fetch in `num_layers` layers of a cache from `layer` on: one piece of memory
    a block. first: the number of that layer, counted through the caches."""

    cache: int
    layer: int
    num_layers: int
    first: int
    begin: int
    end: int

    def num_bytes(self, layout: Layout) -> int:
        """Of one block."""
        return self.num_layers * layout.piece_bytes[self.cache]

    def sources(self, layout: Layout, transfer: Transfer, base: int) -> np.ndarray:
        """Addresses of the sender's pieces, int64 [end - begin]; base: where its cache begins."""
        blocks = transfer.remote[transfer.first + self.begin : transfer.first + self.end]
        return layout.places(base, self.cache, self.layer, blocks)

    def targets(self, layout: Layout, transfer: Transfer) -> np.ndarray:
        """Addresses of ours, int64 [end - begin]."""
        assert transfer.local is not None
        blocks = transfer.local[self.begin : self.end]
        return layout.places(layout.addresses[self.cache], self.cache, self.layer, blocks)


def next_spans(layout: Layout, transfer: Transfer) -> list[Span]:
    """What is ready and not read, of about TURN_BYTES at most: whole blocks where all layers are ready,
    which are the largest copies, else what the first layers have."""
    done, ready = max(transfer.done), min(map(transfer.available, range(layout.num_layers)))
    if done == min(transfer.done) and ready > done:
        end = min(ready, done + max(1, TURN_BYTES // layout.block_bytes))
        firsts = [layout.layers.index((i, 0)) for i in range(len(layout.caches))]
        counts = [cache.shape[1] for cache in layout.caches]
        return [Span(i, 0, counts[i], first, done, end) for i, first in enumerate(firsts)]
    spans: list[Span] = []
    room = TURN_BYTES
    for number, (cache, layer) in enumerate(layout.layers):
        begin, end = transfer.done[number], transfer.available(number)
        end = min(end, begin + max(1, room // layout.piece_bytes[cache]))
        if end > begin and room > 0:
            spans.append(Span(cache, layer, 1, number, begin, end))
            room -= (end - begin) * layout.piece_bytes[cache]
    return spans


def note_read(transfer: Transfer, spans: list[Span]) -> None:
    """They are there."""
    for span in spans:
        for layer in range(span.first, span.first + span.num_layers):
            transfer.written(layer, span.end)


class Read(NamedTuple):
    """What a turn has read: bytes, the seconds that this took, and in how many seconds there may be more."""

    num_bytes: int
    seconds: float
    waits: float
