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

import itertools
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from common import kv_transfer
from common.kv_memory import share_kv
from common.kv_store import open_copies
from common.kv_transfer.fetching import Fetched
from common.kv_transfer.options import receiver_options, sender_options
from common.kv_transfer.outcomes import Outcomes, prefixed
from common.requests import Request
from common.sampling import SamplingParams

from .block_cache import Hold
from .config import EngineConfig
from .kv_cache import KVCache
from .kv_connector import KVConnector
from .offload import Offload
from .ranks import fingerprint
from .sequence import Sequence, Status

if TYPE_CHECKING:
    from common.kv_transfer import PrefillRequest

    from .scheduler import SchedulerOutput

ONE_TOKEN = SamplingParams(temperature=0.0, max_tokens=1)


class PeerConnector(KVConnector):
    """What both sides have: blocks that outlive their sequence, by the transfer that needs them."""

    def __init__(self, config: EngineConfig, kv: KVCache) -> None:
        self.role, self.kv = config.role, kv
        self.holds: dict[str, Hold] = {}
        rounding = ("quantization", "quantize_embeddings", "activations")  # other weights, other KV
        self.prints = fingerprint(asdict(config)) | {"block size": str(kv.block_size)}
        self.prints |= {name: str(getattr(config, name)) for name in rounding}

    def let_go(self, transfer_id: str) -> None:
        if (hold := self.holds.pop(transfer_id, None)) is not None:
            self.cache.let_go(hold)

    def held(self) -> list[list[int]]:
        return [hold.blocks for hold in self.holds.values()]


class PrefillConnector(PeerConnector):
    """Computes prompts for others: the scheduler's side and the workers'."""

    def __init__(self, config: EngineConfig, kv: KVCache) -> None:
        super().__init__(config, kv)
        self.add = self.abort = refuse
        self.asked: dict[str, str] = {}  # transfers by the request that computes their prompt
        self.saves: list[tuple[str, list[int], int]] = []  # of the step that runs
        share_kv(kv, config.kv_transfer)
        self.sender = kv_transfer.Sender(
            [kv.data],
            fingerprint=self.prints,
            on_prefill=self.take,
            on_cancel=lambda transfer_id: self.abort(f"prefill-{transfer_id}"),
            **sender_options(config),
        )
        self.address = self.sender.address

    def serve(self, add: Callable[[Request], None], abort: Callable[[str], None]) -> None:
        self.add, self.abort = add, abort

    def take(self, wanted: "PrefillRequest") -> None:
        """In the sender's thread: a prompt has come. One token is sampled, and read by nobody."""
        name, salt = f"prefill-{wanted.transfer_id}", wanted.cache_salt
        self.asked[name] = wanted.transfer_id
        try:
            self.add(Request(name, wanted.token_ids, ONE_TOKEN, cache_salt=salt))
        except ValueError as error:
            del self.asked[name]
            self.sender.fail(wanted.transfer_id, str(error))

    def build_connector_meta(self, output: "SchedulerOutput") -> list[tuple[str, list[int], int]]:
        """Transfers, their blocks, and how many of these are final when a layer of this step has run."""
        saves = []
        for sequence, count in output.num_new_tokens.items():
            if (transfer_id := self.asked.get(sequence.request_id)) is not None:
                end, last = sequence.num_computed_tokens + count, len(sequence.prompt_token_ids) - 1
                num_blocks = self.kv.blocks_for(last)
                final = num_blocks if end >= last else end // self.kv.block_size
                saves.append((transfer_id, sequence.block_table[:num_blocks], final))
        return saves

    def start_load_kv(self, meta: list[tuple[str, list[int], int]]) -> None:
        self.saves = meta

    def save_kv_layer(self, layer: int) -> None:
        for transfer_id, blocks, final in self.saves:
            self.sender.ready(transfer_id, blocks, layer, final)
        if layer == self.kv.data.shape[1] - 1:  # the next step may have none
            self.saves = []

    def request_finished(self, sequence: Sequence) -> None:
        if (transfer_id := self.asked.pop(sequence.request_id, None)) is None:
            return
        if sequence.output_token_ids:
            self.holds[transfer_id] = self.cache.hold(sequence)
            self.sender.finish(transfer_id, len(sequence.block_table))
        else:
            self.sender.fail(transfer_id, "the prompt was not computed")

    def request_preempted(self, sequence: Sequence) -> bool:
        """Its blocks get other owners, some read by the peer and some not."""
        if (transfer_id := self.asked.get(sequence.request_id)) is not None:
            self.sender.fail(transfer_id, "the worker has no room for the prompt")
        return False

    def get_finished(self) -> list[str]:
        return self.sender.released()

    def wait(self, seconds: float) -> None:
        self.sender.wait(seconds)

    def update_connector_output(self, finished: Iterable[str]) -> list[tuple[Sequence, int]]:
        for transfer_id in finished:
            if self.asked.pop(name := f"prefill-{transfer_id}", None) is not None:
                self.abort(name)  # it would be computed for nobody
            self.let_go(transfer_id)
        return []

    @property
    def is_busy(self) -> bool:
        return bool(self.holds)

    def drop(self) -> None:
        for transfer_id in [*list(self.asked.values()), *self.holds]:
            self.sender.fail(transfer_id, "the worker has dropped its KV cache")

    def stats(self) -> dict[str, Any]:
        return prefixed("kv_sender", self.sender.stats()) | {"num_kv_held": len(self.holds)}

    def shutdown(self) -> None:
        self.sender.close()


class DecodeConnector(PeerConnector):
    """Lets others compute prompts: the scheduler's side and the workers'."""

    def __init__(self, config: EngineConfig, kv: KVCache) -> None:
        super().__init__(config, kv)
        self.min_tokens, self.outcomes = config.kv_min_tokens, Outcomes()
        self.sequences: dict[str, Sequence] = {}  # by transfer, until the receiver has ended it
        self.wanted: dict[Sequence, str] = {}  # transfers, until they are cancelled or ended
        self.fetches: list[tuple[str, int, list[int]]] = []  # for the next step
        self.numbers = itertools.count()
        options = receiver_options(config)
        self.secret = options["secret"]
        self.receiver = kv_transfer.Receiver([kv.data], fingerprint=self.prints, **options)

    def on_new_request(self, sequence: Sequence) -> None:
        """Ask at once: the prompt is computed while the sequence waits for blocks."""
        request, num_tokens = sequence.request, sequence.num_cacheable_tokens
        if (ticket := request.kv_ticket) is None:
            return
        num_found = len(self.cache.match(sequence).blocks) * self.kv.block_size
        if num_tokens - num_found < self.min_tokens:
            return self.outcomes.local()
        # A ticket that comes again is another transfer: of the first a fetch may wait for the device.
        transfer_id = f"{ticket.transfer_id}.{next(self.numbers)}"
        self.sequences[transfer_id], self.wanted[sequence] = sequence, transfer_id
        prompt = request.prompt_token_ids, request.cache_salt, self.kv.blocks_for(num_tokens)
        self.receiver.request(ticket.address, transfer_id, *prompt)

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        is_wanted = sequence in self.wanted
        return max(sequence.num_tokens - 1 - num_computed_tokens, 0) if is_wanted else 0, is_wanted

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        if not num_external_tokens:
            return self.cancel(sequence)  # all is in the prefix cache meanwhile
        first = sequence.num_computed_tokens // self.kv.block_size
        blocks = sequence.block_table[first : self.kv.blocks_for(sequence.num_tokens - 1)]
        self.fetches.append((self.wanted[sequence], first, blocks))

    def build_connector_meta(self, output: "SchedulerOutput") -> list[tuple[str, int, list[int]]]:
        fetches, self.fetches = self.fetches, []
        return fetches

    def start_load_kv(self, meta: list[tuple[str, int, list[int]]]) -> None:
        """In the device's order: no step that was launched before writes to these blocks any more."""
        for transfer_id, first, blocks in meta:
            self.receiver.fetch(transfer_id, first, blocks)

    def cancel(self, sequence: Sequence) -> None:
        """It wants nothing more. Blocks that may yet be written to are held until that has ended."""
        if (transfer_id := self.wanted.pop(sequence, None)) is not None:
            self.receiver.cancel(transfer_id)
            if sequence.status is Status.LOADING:  # else nothing was to be fetched yet
                self.holds[transfer_id] = self.cache.hold(sequence)

    def request_finished(self, sequence: Sequence) -> None:
        self.cancel(sequence)

    def get_finished(self) -> list[Fetched]:
        return self.receiver.finished()

    def wait(self, seconds: float) -> None:
        self.receiver.wait(seconds)

    def update_connector_output(self, finished: Iterable[Fetched]) -> list[tuple[Sequence, int]]:
        loaded = []
        for fetched in finished:
            sequence = self.sequences.pop(fetched.transfer_id)
            self.wanted.pop(sequence, None)
            self.let_go(fetched.transfer_id)
            missing = sequence.num_tokens - 1 - sequence.num_computed_tokens
            loaded.append((sequence, min(fetched.num_blocks * self.kv.block_size, missing)))
            self.outcomes.ended(fetched, loaded[-1][1])
        return loaded

    @property
    def is_busy(self) -> bool:
        return bool(self.sequences)

    def drop(self) -> None:
        for transfer_id in self.sequences:
            self.receiver.cancel(transfer_id)

    def stats(self) -> dict[str, Any]:
        return prefixed("kv_receiver", self.receiver.stats()) | self.outcomes.counts

    def shutdown(self) -> None:
        self.receiver.close()


def refuse(request: Any) -> None:
    raise ValueError("the worker serves no prompts yet")


def make_workers_side(
    config: EngineConfig, kv: KVCache, minimum: Callable[[int], int], num_ranks: int
) -> Any:
    """The workers' side, on this rank. minimum: of a number, over all ranks. Raises ValueError."""
    if config.role == "both":
        return open_copies(config, kv.data, minimum, num_ranks)
    return (PrefillConnector if config.role == "prefill" else DecodeConnector)(config, kv)


def make_connector(config: EngineConfig, kv: KVCache, worker: Any) -> KVConnector:
    """The scheduler's side, of what `make_workers_side` has made."""
    return Offload(config, kv, worker) if config.role == "both" else worker
