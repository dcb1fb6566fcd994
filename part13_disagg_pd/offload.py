"""The host's memory as a tier under the block pool: what the device has no room for is kept there.

Two things go there: the blocks of a sequence that is preempted, so that it need not compute them once
more (swap); and blocks that others may find by their keys, so that a beginning which the device has
forgotten is still known (prefix). These are written through: each block that is published is copied
once, while the device goes on, and the device may forget it at any time after. Behind the host's
memory there may be a folder on disk, whose blocks outlive the process.

A copy under way is one more owner of its blocks, on the device and on the host. So neither is given
to another sequence before the copy is done, whatever becomes of the sequence that it is for.

It is the scheduler's side of a connector (`kv_connector.py`); `common.kv_store` has the workers'.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from common.kv_store import BlockCopies, Copied, Copy, HostBlocks, Rates

from .block_cache import Hold
from .config import EngineConfig
from .kv_cache import KVCache
from .kv_connector import KVConnector
from .sequence import Sequence, Status

if TYPE_CHECKING:
    from .scheduler import SchedulerOutput


@dataclass(frozen=True)
class Transfer:
    """A copy under way."""

    copy: Copy
    sequence: Sequence
    hold: Hold | None  # of device blocks
    num_tokens: int = 0  # that come with it
    keys: list[bytes] = field(default_factory=list)


class Offload(KVConnector):
    """What is copied when, on rank 0. Where the blocks are is told to all ranks."""

    def __init__(self, config: EngineConfig, kv: KVCache, copies: BlockCopies) -> None:
        self.kv, self.block_size, self.copies = kv, kv.block_size, copies
        self.swaps = config.offload in ("swap", "both")
        self.keeps_prefixes = config.offload in ("prefix", "both")
        self.policy = config.offload_policy
        self.host = HostBlocks(copies.num_host_blocks, self.policy, copies.disk)
        self.rates = Rates()
        self.swapped: dict[Sequence, list[int]] = {}  # host blocks of what waits for its return
        self.transfers: dict[int, Transfer] = {}  # by number of the copy
        self.orders: list[Copy] = []  # for the next step
        self.num_copies = 0
        self.counts = dict.fromkeys(COUNTS, 0)

    @property
    def is_busy(self) -> bool:
        """Whether copies are under way."""
        return bool(self.transfers)

    @property
    def will_free(self) -> bool:
        """Whether device blocks come free when copies are done."""
        gone = (Status.WAITING, Status.FINISHED)
        return any(t.hold and t.sequence.status in gone for t in self.transfers.values())

    def order(
        self,
        kind: str,
        sequence: Sequence,
        blocks: list[int],
        host_blocks: list[int],
        num_tokens: int = 0,
        keys: Iterable[bytes] = (),
        disk_keys: Iterable[bytes | None] = (),
    ) -> None:
        """Begin a copy before the next step. It becomes the owner of the host blocks."""
        self.num_copies += 1
        copy = Copy(self.num_copies, kind, blocks, host_blocks, list(disk_keys))
        hold = self.cache.hold(sequence, blocks) if blocks else None
        self.transfers[copy.number] = Transfer(copy, sequence, hold, num_tokens, list(keys))
        self.orders.append(copy)

    def keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of a sequence's first blocks, each made of all tokens up to its end, and of the salt.
        They are the same in every process that has this kind of prefix cache."""
        keys = sequence.host_keys
        for key in self.cache.keys(sequence, count * self.block_size, len(keys)):
            keys.append(hashlib.sha256((keys[-1] if keys else b"") + key).digest())
        return keys[:count]

    # to the device

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens of a sequence the host has beyond those that the device has, and whether
        they come while steps go on. Nothing is changed."""
        first = num_computed_tokens // self.block_size
        if sequence in self.swapped:
            return max(sequence.num_kept_tokens - num_computed_tokens, 0), True
        if not self.keeps_prefixes:
            return 0, False
        keys = self.keys(sequence, sequence.num_cacheable_tokens // self.block_size)[first:]
        known = next((i for i, key in enumerate(keys) if key not in self.host), len(keys))
        return known * self.block_size, True

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """A sequence has blocks for all of its tokens: bring so many behind those that are computed."""
        first = sequence.num_computed_tokens // self.block_size
        table = sequence.block_table[first:]
        if self.keeps_prefixes and not (sequence in self.swapped or sequence.num_lost_tokens):
            self.counts["num_external_queries"] += sequence.num_tokens - first * self.block_size
        if (kept := self.swapped.pop(sequence, None)) is not None:
            first = first if num_external_tokens else len(kept)
            self.host.free(kept[:first])
            if blocks := kept[first:]:
                self.order("load", sequence, table[: len(blocks)], blocks, num_external_tokens)
        elif num_external_tokens:
            keys = self.keys(sequence, first + num_external_tokens // self.block_size)[first:]
            blocks, read = self.host.acquire(keys)
            self.counts["num_disk_hits"] += self.block_size * (len(read) - read.count(None))
            count = len(blocks)  # there may be too little room for what is read from disk
            num_tokens = count * self.block_size
            self.order("load", sequence, table[:count], blocks, num_tokens, keys[:count], read)

    # to the host

    def build_connector_meta(self, output: "SchedulerOutput") -> list[Copy]:
        """The copies that begin before this step."""
        for sequence in output.num_new_tokens:
            self.save_published(sequence)
        orders, self.orders = self.orders, []
        return orders

    def save_published(self, sequence: Sequence) -> None:
        """Copy those blocks of a sequence that others can find and the host does not have."""
        first, count = sequence.num_saved_blocks, sequence.num_published_blocks
        if not self.keeps_prefixes or first >= count:
            return
        sequence.num_saved_blocks = count
        keys = self.keys(sequence, count)
        new = [i for i in range(first, count) if keys[i] not in self.host.of_key]
        if new and (blocks := self.host.allocate(len(new))):
            new_keys, table = [keys[i] for i in new], sequence.block_table
            self.host.publish(new_keys, blocks)  # a copy that loads them is carried out later
            self.host.renew(keys)
            self.order("save", sequence, [table[i] for i in new], blocks, keys=new_keys)

    def request_preempted(self, sequence: Sequence) -> bool:
        """A sequence is about to lose its blocks. Returns whether what is in them is kept on the
        host, which it is where copies take less time than computing it again."""
        num_tokens = sequence.num_computed_tokens
        num_blocks = self.kv.blocks_for(num_tokens)
        if not self.swaps or not num_blocks or not self.rates.swap_pays(num_blocks, num_tokens):
            return False
        self.save_published(sequence)
        places = self.host.places(self.keys(sequence, sequence.num_saved_blocks))
        self.host.share(places.values())
        new = [i for i in range(num_blocks) if i not in places]
        blocks = self.host.allocate(len(new))
        if blocks is None:
            self.host.free(places.values())
            return False
        if new:
            self.host.share(blocks)  # owned by the copy, and by the sequence
            self.order("save", sequence, [sequence.block_table[i] for i in new], blocks)
        places |= dict(zip(new, blocks, strict=True))
        self.swapped[sequence] = [places[i] for i in range(num_blocks)]
        sequence.num_kept_tokens = num_tokens
        self.counts["num_swapped_tokens"] += num_tokens
        return True

    def request_finished(self, sequence: Sequence) -> None:
        """A sequence has ended, whatever its status, and is about to lose its blocks."""
        if sequence.block_table:
            self.save_published(sequence)
        self.host.free(self.swapped.pop(sequence, []))

    # when copies are done

    def update_connector_output(self, finished: Iterable[Copied]) -> list[tuple[Sequence, int]]:
        """Returns the sequences that were waited for, and how many of their tokens have come: fewer
        than were to come where the disk has failed."""
        loaded = []
        for done in finished:
            transfer = self.transfers.pop(done.number)
            copy, kind = transfer.copy, transfer.copy.kind
            if transfer.hold is not None:
                self.cache.let_go(transfer.hold)
                self.rates.observe_copy(done.num_blocks, done.seconds)
                self.counts[f"offload_bytes_{kind}"] += done.num_bytes
                self.counts[f"offload_seconds_{kind}"] += done.seconds
            if kind == "load":
                loaded.append((transfer.sequence, self.finish_load(transfer, done.num_blocks)))
            elif transfer.keys and not done.is_whole:  # and no load of them has counted them
                self.host.forget(transfer.keys, copy.host_blocks)
            elif kind == "save" and self.host.disk is not None and transfer.keys:
                self.host.share(copy.host_blocks)
                self.order(
                    "store", transfer.sequence, [], copy.host_blocks, disk_keys=transfer.keys
                )
            self.host.free(copy.host_blocks)
        return loaded

    def finish_load(self, transfer: Transfer, num_blocks: int) -> int:
        """num_blocks: those that have come. Returns how many tokens these are."""
        copy, sequence = transfer.copy, transfer.sequence
        if not transfer.keys:  # it was swapped
            if num_blocks == len(copy.host_blocks):
                return transfer.num_tokens
            sequence.num_lost_tokens = sequence.num_kept_tokens
            return num_blocks * self.block_size
        self.host.arrived(copy.host_blocks[:num_blocks], copy.disk_keys)
        num_tokens = num_blocks * self.block_size
        self.counts["num_host_hits"] += num_tokens
        if not sequence.num_lost_tokens:  # it joins for the first time
            sequence.num_cached_tokens += num_tokens
        return num_tokens

    def forget(self) -> None:
        """Know nothing of what is on the host: its memory is about to go. No copy is under way."""
        for sequence in self.swapped:
            sequence.num_lost_tokens = sequence.num_kept_tokens
        self.swapped.clear()
        self.host = HostBlocks(self.copies.num_host_blocks, self.policy, self.copies.disk)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long on the device."""
        self.rates.observe_step(num_tokens, seconds)

    def check_integrity(self) -> None:
        """Assert that every host block is free, or owned by a key, a sequence or a copy."""
        copies = [transfer.copy.host_blocks for transfer in self.transfers.values()]
        self.host.check_integrity([*self.swapped.values(), *copies])

    def held(self) -> list[list[int]]:
        """Device blocks that copies own."""
        return [t.hold.blocks for t in self.transfers.values() if t.hold is not None]

    def stats(self) -> dict[str, Any]:
        """Blocks on the host, what is there in bytes, and what was copied."""
        num_blocks, num_free = self.host.num_blocks, len(self.host.free_blocks)
        numbers = {"num_host_blocks": num_blocks, "num_used_host_blocks": num_blocks - num_free}
        disk = {} if self.host.disk is None else self.host.disk.stats()
        kept = {f"disk_{name}": number for name, number in disk.items()}
        return numbers | {"host_kv_bytes": self.copies.num_bytes} | self.counts | kept


COUNTS = (
    "num_swapped_tokens",  # of preempted sequences
    "num_external_queries",  # tokens that were looked for
    "num_host_hits",  # tokens found on the host or on disk
    "num_disk_hits",  # tokens of these that were read from disk
    "offload_bytes_save",
    "offload_bytes_load",
    "offload_seconds_save",
    "offload_seconds_load",
)
