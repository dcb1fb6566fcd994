"""The side that wants KV: it sends prompts to senders, and fetches pieces while the rest is computed.

Only this side's thread writes into its blocks, and only between `fetch` and the entry in `finished`: what
comes late finds no transfer. After the last piece the sender is asked whether it held the blocks all the
time; if it did not (its lease was over, because this process was stopped), nothing of it is used.
"""

import logging
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from common.kv_transfer.auth import check_secret
from common.kv_transfer.fetching import Fetched, Transfer
from common.kv_transfer.inlets import Inlets
from common.kv_transfer.layout import Layout
from common.kv_transfer.loop import Loop
from common.kv_transfer.peer import CLOSED, Peer

logger = logging.getLogger(__name__)
LOOK_SECONDS = 0.0005  # between looks at a GPU's event, or a read of a peer that is lost


class Receiver:
    """Fetches into `caches` in a thread of its own; knows any number of senders."""

    def __init__(
        self,
        caches: Sequence[Tensor],
        *,
        fingerprint: dict[str, str],
        secret: bytes,
        timeout: float = 30.0,
    ) -> None:
        """caches: as the sender's, but for the number of blocks. timeout: seconds that a sender may be
        silent, or a fetch without progress. Raises ValueError."""
        check_secret(secret)
        self.layout = Layout(caches)
        self.inlets = Inlets(self.layout)
        self.secret, self.timeout = secret, timeout
        self.fingerprint = {**fingerprint, "kv caches": self.layout.describe()}
        self._peers: dict[str, Peer] = {}  # by address
        self._early: list[tuple[Any, str, int, list[int]]] = []  # fetches that wait for a GPU
        self._leaving: list[Peer] = []  # lost ones, whose last reads are under way
        self._where: dict[str, Peer] = {}  # of a transfer that has not ended
        self._lock = threading.Lock()
        self._ids: set[str] = set()  # not in `finished` yet
        self._finished: list[Fetched] = []
        self._news = threading.Event()
        self._totals: Counter[str] = Counter()
        self.loop = Loop("kv receiver", self._turn)
        self.loop.start()

    # What the engine says.

    def request(
        self,
        address: str,
        transfer_id: str,
        token_ids: list[int],
        cache_salt: str | None,
        num_blocks: int,
    ) -> None:
        """Ask the sender at this address for a prompt's KV: the first `num_blocks` blocks. Whatever
        comes of it, one entry of `finished` ends it. Raises ValueError when the id is in use."""
        with self._lock:
            if transfer_id in self._ids:
                raise ValueError(f"transfer_id {transfer_id} is in use")
            self._ids.add(transfer_id)
        transfer = Transfer(transfer_id, self.layout.num_layers, num_blocks)
        self.loop.call(self._request, address, transfer, list(token_ids), cache_salt)

    def fetch(self, transfer_id: str, first: int, blocks: list[int]) -> None:
        """The transfer's blocks from number `first` on go into these blocks of ours, once. On a GPU: when
        the current stream has come this far, so no step before writes there. Nothing happens when the
        transfer has ended."""
        assert all(0 <= b < self.layout.num_blocks for b in blocks), f"no such blocks: {blocks}"
        self.loop.call(self._fetch, self.layout.record(), transfer_id, first, list(blocks))

    def cancel(self, transfer_id: str) -> None:
        """End it. Blocks may be written until it is in `finished`. Nothing happens when it has ended."""
        self.loop.call(self._cancel, transfer_id)

    def finished(self) -> list[Fetched]:
        """Transfers that have ended since the last call, each once: nothing writes their blocks."""
        with self._lock:
            self._news.clear()
            ended, self._finished = self._finished, []
            self._ids.difference_update(f.transfer_id for f in ended)
        return ended

    def wait(self, seconds: float) -> bool:
        """Until something has finished, or the time is over. Whether something has."""
        return self._news.wait(seconds)

    def stats(self) -> dict[str, float]:
        """transfers and connections that live; TRANSPORT_bytes and TRANSPORT_seconds: KV that was
        written and how long this took, waits not counted; fetched, failed: transfers."""
        with self._lock:
            live = {"transfers": float(len(self._ids)), "connections": float(len(self._peers))}
            return live | dict(self._totals)

    def close(self) -> None:
        """Ends all transfers (their entries come into `finished`), connections and the thread."""
        self.loop.close(self._close_peers)

    # Everything below happens in the loop's thread.

    def _request(
        self, address: str, transfer: Transfer, token_ids: list[int], cache_salt: str | None
    ) -> None:
        peer = self._peers.get(address)
        try:
            if peer is None:
                peer = self._peers[address] = Peer(self, address)
        except (ValueError, OSError) as error:
            logger.warning("kv receiver: %s: %s", address, error)
            self.ended(transfer, f"{address}: {error}")
            return
        self._where[transfer.id] = peer
        peer.begin(transfer, token_ids, cache_salt)

    def _fetch(self, event: Any, transfer_id: str, first: int, blocks: list[int]) -> None:
        if event is not None and not event.query():
            self._early.append((event, transfer_id, first, blocks))
        elif transfer_id in self._where:
            self._where[transfer_id].fetch(transfer_id, first, blocks)

    def _cancel(self, transfer_id: str) -> None:
        if transfer_id in self._where:
            self._where[transfer_id].cancel(transfer_id)

    def _turn(self) -> float:
        now = time.monotonic()
        early, self._early = self._early, []
        for fetch in early:
            self._fetch(*fetch)
        waits = [peer.turn(now) for peer in list(self._peers.values())]
        self._leaving = [peer for peer in self._leaving if not peer.leave()]
        return min([LOOK_SECONDS if self._leaving or self._early else 1.0, *waits])

    def ended(self, transfer: Transfer, error: str | None) -> None:
        """For a peer: nothing writes the transfer's blocks any more."""
        self._where.pop(transfer.id, None)
        fetched = transfer.result(error)
        with self._lock:
            self._totals["failed" if error else "fetched"] += 1
            self._finished.append(fetched)
            self._news.set()

    def copied(self, transport: str, num_bytes: int, seconds: float) -> None:
        """For a peer's inlet: so much has been written."""
        with self._lock:
            self._totals[f"{transport}_bytes"] += num_bytes
            self._totals[f"{transport}_seconds"] += seconds  # type: ignore[assignment]

    def lost(self, peer: Peer) -> None:
        """For a peer: it is of no more use. The next request connects anew."""
        if self._peers.get(peer.address) is peer:
            del self._peers[peer.address]
        if not peer.leave():
            self._leaving.append(peer)

    def _close_peers(self) -> None:
        for peer in list(self._peers.values()):
            peer.lose(CLOSED)
        while self._leaving:
            self._leaving = [peer for peer in self._leaving if not peer.leave()]
            time.sleep(LOOK_SECONDS)
        self.inlets.close()
