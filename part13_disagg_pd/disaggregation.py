"""Prompts are computed by some workers, tokens by others: keys and values go from one to the other.

    decode worker                                             prefill worker
    request --> asks, and sends the prompt  ----------------> sequence of one token
      |         (WAITING)                                       | layer after layer, slice after slice:
    blocks for the whole prompt (LOADING)   <--- ready -------- | blocks so far, final in this layer
      |         reads pieces into them as they become ready     |
      |         all are there: was the lease held?   <--------> holds the blocks until they are read,
    computes the last token (RUNNING)                           or the lease is over

The prefill worker gives all but the last token's. That one the decode worker computes itself, so
sampling is as if it had computed all: noise, penalties and log probabilities are its own. It asks only
where a prompt has `kv_min_tokens` that its prefix cache does not have: a short prompt costs less to
compute than to wait for. And whatever fails, it computes what has not come: no request fails for it.

The reader alone writes its blocks, and they are its own until it says that it has ended. So nothing
that comes late can be written into a block that has another owner.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from common.kv_transfer import Fetched, PrefillRequest, Receiver, Sender
from common.kv_transfer.ticket import Ticket, read_secret, read_ticket
from common.requests import Request
from common.sampling import SamplingParams

from .block_cache import BlockCache, Hold
from .config import EngineConfig
from .kv_cache import KVCache
from .kv_connector import KVConnector
from .offload import make_offload
from .sequence import Sequence

if TYPE_CHECKING:
    from .scheduler import SchedulerOutput

logger = logging.getLogger(__name__)


class PrefillConnector(KVConnector):
    """The side that computes prompts for others: both the scheduler's and the workers'."""

    def __init__(self, config: EngineConfig, fingerprint: dict[str, str]) -> None:
        self.config, self.fingerprint, self.secret = config, fingerprint, secret_of(config)
        self.asked: dict[str, str] = {}  # transfers by the request that computes their prompt
        self.holds: dict[str, Hold] = {}  # by transfer: computed, and not read yet
        self.saves: list[tuple[str, list[int], int]] = []  # of the step that runs

    def register_kv_caches(self, caches: list[torch.Tensor]) -> None:
        config = self.config
        self.sender = Sender(
            caches,
            fingerprint=self.fingerprint,
            secret=self.secret,
            transport=config.kv_transfer,
            host=config.kv_host,
            port=config.kv_port,
            lease=config.kv_lease,
            on_prefill=self.take,
            on_cancel=lambda transfer_id: self.abort(f"prefill-{transfer_id}"),
        )

    def describe(self) -> dict[str, Any]:
        return {"role": self.config.role, "address": self.sender.address}

    def serve(self, add: Callable[[Request], None], abort: Callable[[str], None]) -> None:
        self.add, self.abort = add, abort

    def take(self, wanted: PrefillRequest) -> None:
        """In the sender's thread: a prompt has come."""
        request = Request(
            f"prefill-{wanted.transfer_id}",
            wanted.token_ids,
            SamplingParams(temperature=0.0, max_tokens=1),
            cache_salt=wanted.cache_salt,
        )
        self.asked[request.request_id] = wanted.transfer_id
        try:
            self.add(request)
        except ValueError as error:
            del self.asked[request.request_id]
            self.sender.fail(wanted.transfer_id, str(error))

    def bind_block_cache(self, cache: BlockCache) -> None:
        self.cache = cache

    def num_wanted_blocks(self, sequence: Sequence) -> int:
        return -(-(len(sequence.prompt_token_ids) - 1) // self.cache.block_size)

    def build_connector_meta(self, output: "SchedulerOutput") -> list[tuple[str, list[int], int]]:
        """Which blocks of which transfers are final when a layer of this step has run."""
        saves = []
        for sequence, count in output.num_new_tokens.items():
            if (transfer_id := self.asked.get(sequence.request_id)) is not None:
                end = sequence.num_computed_tokens + count
                is_whole = end >= len(sequence.prompt_token_ids) - 1
                num_blocks = self.num_wanted_blocks(sequence)
                final = num_blocks if is_whole else end // self.cache.block_size
                saves.append((transfer_id, sequence.block_table[:num_blocks], final))
        return saves

    def start_load_kv(self, meta: list[tuple[str, list[int], int]]) -> None:
        self.saves = meta

    def save_kv_layer(self, layer: int) -> None:
        for transfer_id, blocks, final in self.saves:
            self.sender.ready(transfer_id, blocks, layer, final)

    def wait_for_save(self) -> None:
        self.saves = []

    def request_finished(self, sequence: Sequence) -> None:
        transfer_id = self.asked.pop(sequence.request_id, None)
        if transfer_id is None:
            return
        if sequence.output_token_ids:
            self.holds[transfer_id] = self.cache.hold(sequence)
            self.sender.finish(transfer_id, self.num_wanted_blocks(sequence))
        else:
            self.sender.fail(transfer_id, "the prompt was not computed")

    def request_preempted(self, sequence: Sequence) -> bool:
        """Its blocks will have other owners, some read and some not: the peer begins anew."""
        if (transfer_id := self.asked.pop(sequence.request_id, None)) is not None:
            self.sender.fail(transfer_id, "the worker has no room for the prompt")
        return False

    def get_finished(self) -> list[str]:
        return self.sender.released()

    def update_connector_output(self, finished: Iterable[str]) -> list[tuple[Sequence, int]]:
        for transfer_id in finished:
            self.asked.pop(f"prefill-{transfer_id}", None)  # if it is computed yet, then for nobody
            if (hold := self.holds.pop(transfer_id, None)) is not None:
                self.cache.let_go(hold)
        return []

    @property
    def is_busy(self) -> bool:
        return bool(self.holds)

    def held(self) -> list[list[int]]:
        return [hold.blocks for hold in self.holds.values()]

    def stats(self) -> dict[str, Any]:
        return {f"kv_sender_{name}": value for name, value in self.sender.stats().items()}

    def shutdown(self) -> None:
        self.sender.close()


@dataclass(eq=False)
class Transfer:
    """A prompt that another worker was asked for."""

    id: str
    sequence: Sequence
    num_tokens: int  # that come from there, and from the prefix cache
    num_blocks: int
    first: int | None = None  # block from which on it is read; None: it has no blocks here yet
    hold: Hold | None = None  # of the blocks of a sequence that has ended meanwhile


class DecodeConnector(KVConnector):
    """The side that lets others compute prompts: both the scheduler's and the workers'."""

    def __init__(self, config: EngineConfig, fingerprint: dict[str, str]) -> None:
        self.config, self.fingerprint, self.secret = config, fingerprint, secret_of(config)
        self.transfers: dict[str, Transfer] = {}  # until the receiver has ended them
        self.by_sequence: dict[Sequence, Transfer] = {}  # until the sequence has what there is
        self.fetches: list[tuple[str, int, list[int]]] = []  # for the next step
        self.counts: dict[str, float] = dict.fromkeys(COUNTS, 0)

    def register_kv_caches(self, caches: list[torch.Tensor]) -> None:
        config = self.config
        self.receiver = Receiver(
            caches,
            fingerprint=self.fingerprint,
            secret=self.secret,
            timeout=config.kv_timeout,
        )

    def bind_block_cache(self, cache: BlockCache) -> None:
        self.cache = cache

    def on_new_request(self, sequence: Sequence) -> None:
        """Ask at once: the prompt is computed while the sequence waits for blocks."""
        ticket, num_tokens = sequence.request.kv_ticket, sequence.num_cacheable_tokens
        if ticket is None or ticket.transfer_id in self.transfers:
            return
        num_found = len(self.cache.match(sequence).blocks) * self.cache.block_size
        if num_tokens - num_found < self.config.kv_min_tokens:
            self.counts["num_kv_local"] += 1
            return
        num_blocks = -(-num_tokens // self.cache.block_size)
        transfer = Transfer(ticket.transfer_id, sequence, num_tokens, num_blocks)
        self.transfers[transfer.id] = self.by_sequence[sequence] = transfer
        request = sequence.request
        self.receiver.request(
            ticket.address, transfer.id, request.prompt_token_ids, request.cache_salt, num_blocks
        )

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        transfer = self.by_sequence.get(sequence)
        if transfer is None:
            return 0, False
        return max(transfer.num_tokens - num_computed_tokens, 0), True

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        transfer = self.by_sequence[sequence]
        transfer.first = sequence.num_computed_tokens // self.cache.block_size
        blocks = sequence.block_table[transfer.first : transfer.num_blocks]
        self.fetches.append((transfer.id, transfer.first, blocks))

    def build_connector_meta(self, output: "SchedulerOutput") -> list[tuple[str, int, list[int]]]:
        for sequence in output.admitted:
            self.cancel(sequence)  # it has found all in the prefix cache meanwhile
        fetches, self.fetches = self.fetches, []
        return fetches

    def start_load_kv(self, meta: list[tuple[str, int, list[int]]]) -> None:
        """In the device's order: no step that was launched before writes to these blocks any more."""
        for transfer_id, first, blocks in meta:
            self.receiver.fetch(transfer_id, first, blocks)

    def cancel(self, sequence: Sequence) -> None:
        """It wants nothing more. Blocks that may yet be written to are kept until that has ended."""
        if (transfer := self.by_sequence.pop(sequence, None)) is not None:
            self.receiver.cancel(transfer.id)
            if transfer.first is not None:
                transfer.hold = self.cache.hold(sequence)

    def request_finished(self, sequence: Sequence) -> None:
        self.cancel(sequence)

    def get_finished(self) -> list[Fetched]:
        return self.receiver.finished()

    def wait(self, seconds: float) -> None:
        self.receiver.wait(seconds)

    def update_connector_output(self, finished: Iterable[Fetched]) -> list[tuple[Sequence, int]]:
        loaded = []
        for fetched in finished:
            transfer = self.transfers.pop(fetched.transfer_id)
            if transfer.hold is not None:
                self.cache.let_go(transfer.hold)
            if self.by_sequence.pop(transfer.sequence, None) is None:
                self.counts["num_kv_cancelled"] += 1
                continue
            num_tokens = 0
            if transfer.first is not None:
                size, first = self.cache.block_size, transfer.first
                end = min((first + fetched.num_blocks) * size, transfer.num_tokens)
                num_tokens = max(end - first * size, 0)
                loaded.append((transfer.sequence, num_tokens))
            self.count(fetched, num_tokens)
        return loaded

    def count(self, fetched: Fetched, num_tokens: int) -> None:
        """Where the time went, of a transfer that has brought something."""
        if fetched.error is not None or not num_tokens:
            self.counts["num_kv_failed"] += 1
            return
        times = fetched.times
        self.counts["num_kv_fetched"] += 1
        self.counts["num_kv_tokens"] += num_tokens
        begin = max(times["computed"], times["fetch"])
        self.counts["kv_seconds_queue"] += times["ready"] - times["requested"]
        self.counts["kv_seconds_prefill"] += times["computed"] - times["ready"]
        self.counts["kv_seconds_room"] += begin - times["computed"]
        self.counts["kv_seconds_transfer"] += times["ended"] - begin
        self.counts["kv_seconds_copying"] += times["copying"]

    @property
    def is_busy(self) -> bool:
        return bool(self.transfers)

    def held(self) -> list[list[int]]:
        return [t.hold.blocks for t in self.transfers.values() if t.hold is not None]

    def describe(self) -> dict[str, Any]:
        return {"role": self.config.role, "address": None}

    def ticket_of(self, header: str | None) -> Ticket | None:
        if header is None:
            return None
        try:
            return read_ticket(header, self.secret)
        except ValueError as error:
            logger.warning("a prompt is computed here: %s", error)
            return None

    def stats(self) -> dict[str, Any]:
        return self.counts | {
            f"kv_receiver_{name}": value for name, value in self.receiver.stats().items()
        }

    def shutdown(self) -> None:
        self.receiver.close()


COUNTS = (
    "num_kv_local",  # prompts with a ticket that were too short, or known
    "num_kv_fetched",
    "num_kv_failed",  # and so were computed here
    "num_kv_cancelled",
    "num_kv_tokens",  # that came
    # of those fetched, from asking to having all, one after the other
    "kv_seconds_queue",  # until the first layer of the first slice was computed there
    "kv_seconds_prefill",  # until all was
    "kv_seconds_room",  # until there were blocks for it here
    "kv_seconds_transfer",  # until all had come
    "kv_seconds_copying",  # of all this, in which bytes were copied
)


def make_worker_connector(
    config: EngineConfig, kv: KVCache, copies: KVConnector, fingerprint: dict[str, str]
) -> KVConnector:
    """The workers' side. copies: the host tier's. fingerprint: what must be alike at a peer's. Raises
    ValueError."""
    if config.role == "both":
        return copies
    kind = {"prefill": PrefillConnector, "decode": DecodeConnector}[config.role]
    connector = kind(config, fingerprint)
    connector.register_kv_caches([kv.data])
    return connector


def make_connector(config: EngineConfig, kv: KVCache, worker: KVConnector) -> KVConnector:
    """The scheduler's side, of what `make_worker_connector` has made."""
    return make_offload(config, kv, worker) if config.role == "both" else worker


def secret_of(config: EngineConfig) -> bytes:
    """What proxy and workers share. Raises ValueError."""
    if config.kv_secret_file is not None:
        return read_secret(config.kv_secret_file)
    return config.kv_secret.encode("latin-1")
