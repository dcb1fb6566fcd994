"""The host's memory as a tier under the block pool: what the device has no room for is kept there.

Two things go there. The blocks of a sequence that is preempted (swap), so that it need not compute
them again; and blocks that other sequences may find by their keys (prefix), so that a beginning which
the device has forgotten is still known. Published blocks are written through: each is copied once,
while the device goes on, and may be forgotten at any time after. Behind the host's memory there can
be a folder on disk, whose blocks outlive the process.

Blocks under way have the copy as one more owner, on the device and on the host: neither is given to
another sequence before the copy is done, whatever becomes of the sequence.

The methods have the names of vLLM's connectors (`KVConnectorBase_V1`), and keep their contracts.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from .block_cache import BlockCache, Hold
from .block_copies import Copied, Copy, NoCopies
from .config import EngineConfig
from .eviction import POLICIES
from .kv_cache import BlockPool, KVCache
from .sequence import Sequence, Status

if TYPE_CHECKING:
    from .scheduler import SchedulerOutput


class NoOffload:
    """The scheduler's side of an engine that keeps nothing on the host."""

    will_free = False  # device blocks come free when copies under way are done
    is_busy = False  # copies are under way

    def bind_block_cache(self, cache: BlockCache) -> None:
        """cache: where the sequences' blocks come from."""

    def on_new_request(self, sequence: Sequence) -> None:
        """A sequence has come to the queue."""

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """How many tokens of a sequence can be had from here beyond those that the device has, and
        whether they come while steps go on. None: that is not known yet. Nothing is changed."""
        return 0, False

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        """A sequence has blocks for all of its tokens: bring the keys and values of so many, behind
        those that are computed, or of none."""

    def build_connector_meta(self, output: "SchedulerOutput") -> list[Copy]:
        """What is to be copied, from before this step on."""
        return []

    def update_connector_output(self, finished: Iterable[Copied]) -> list[tuple[Sequence, int]]:
        """Copies that are done. Returns sequences, and how many of their tokens have come: fewer than
        were to come where a copy has failed."""
        return []

    def request_preempted(self, sequence: Sequence) -> bool:
        """A sequence is about to lose its blocks, and will come back. Returns whether its keys and
        values are kept."""
        return False

    def request_finished(self, sequence: Sequence) -> None:
        """A sequence has ended, whatever its status, and may be about to lose its blocks."""

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long on the device."""

    def held(self) -> list[list[int]]:
        """Device blocks that copies own."""
        return []

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""

    def stats(self) -> dict[str, Any]:
        return {}


class HostTier:
    """The blocks on the host: free, found by a key, or owned by sequences and copies."""

    def __init__(self, num_blocks: int, policy: str) -> None:
        self.pool = BlockPool(num_blocks)
        self.blocks: dict[bytes, int] = {}  # the tier is one owner of each
        self.policy = POLICIES[policy](num_blocks)

    def allocate(self, count: int) -> list[int] | None:
        """Take blocks, if need be from keys; None where not so many can be had."""
        while not self.pool.can_allocate(count):
            key = self.policy.evict(lambda key: self.pool.ref_counts[self.blocks[key]] == 1)
            if key is None:
                return None
            self.pool.free([self.blocks.pop(key)])
        return self.pool.allocate(count)

    def insert(self, key: bytes, block: int) -> None:
        """Let a block be found; the tier becomes one more owner of it."""
        self.pool.share([block])
        self.blocks[key] = block
        self.policy.insert(key)


class Rates:
    """Seconds to copy a block, and to compute a token, as measured lately."""

    def __init__(self) -> None:
        self.copied = self.computed = (0.0, 0.0)  # seconds, and what was done in them
        self.largest = 0  # tokens of a step

    def observe_copy(self, num_blocks: int, seconds: float) -> None:
        self.copied = self.add(self.copied, seconds, num_blocks)

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        """Lost tokens are computed in large steps: small ones do not count."""
        self.largest = max(self.largest, num_tokens)
        if 2 * num_tokens >= self.largest:
            self.computed = self.add(self.computed, seconds, num_tokens)

    def add(self, sums: tuple[float, float], seconds: float, count: int) -> tuple[float, float]:
        return 0.9 * sums[0] + seconds, 0.9 * sums[1] + count

    def swap_pays(self, num_blocks: int, num_tokens: int) -> bool:
        """Whether blocks are copied out and in sooner than their tokens computed once more. What was
        never measured costs nothing."""
        (copy_seconds, copied), (seconds, computed) = self.copied, self.computed
        copy = 2 * num_blocks * copy_seconds / max(copied, 1)
        return not computed or copy < num_tokens * seconds / computed


@dataclass(eq=False)
class Transfer:
    """A copy under way, and what it owns until it is done."""

    copy: Copy
    sequence: Sequence | None
    hold: Hold | None = None  # of device blocks
    num_tokens: int = 0  # that come with it
    keys: list[bytes] = field(default_factory=list)  # of a save; of a load those from disk


@dataclass(frozen=True)
class Swapped:
    """What a preempted sequence has on the host."""

    host_blocks: list[int]
    num_tokens: int
    num_drafter_tokens: int


class Offload(NoOffload):
    """Decides what is copied, and keeps account of it."""

    def __init__(self, config: EngineConfig, kv: KVCache, copies: NoCopies) -> None:
        self.kv, self.block_size, self.copies = kv, kv.block_size, copies
        self.swaps = config.offload in ("swap", "both")
        self.keeps_prefixes = config.offload in ("prefix", "both")
        self.tier = HostTier(copies.num_host_blocks, config.offload_policy)
        self.disk, self.rates = copies.disk, Rates()
        self.swapped: dict[Sequence, Swapped] = {}
        self.orders: list[Copy] = []  # for the next step
        self.transfers: dict[int, Transfer] = {}  # by number of the copy
        self.num_copies = 0
        self.counts = dict.fromkeys(COUNTS, 0)

    def bind_block_cache(self, cache: BlockCache) -> None:
        self.cache = cache

    @property
    def is_busy(self) -> bool:
        return bool(self.transfers)

    @property
    def will_free(self) -> bool:
        gone = (Status.WAITING, Status.FINISHED)
        return any(t.hold and t.sequence.status in gone for t in self.transfers.values())

    def order(self, transfer: Transfer) -> None:
        """Begin a copy with the next step."""
        self.num_copies += 1
        transfer.copy = replace(transfer.copy, number=self.num_copies)
        self.transfers[self.num_copies] = transfer
        self.orders.append(transfer.copy)

    def keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """Keys of a sequence's first blocks, each made of all tokens up to its end, and of the salt.
        They are the same whatever the prefix cache, and in every process."""
        keys = sequence.host_keys
        for key in self.cache.keys(sequence, count * self.block_size, len(keys)):
            keys.append(hashlib.sha256((keys[-1] if keys else b"") + key).digest())
        return keys[:count]

    # from the host to the device

    def get_num_new_matched_tokens(
        self, sequence: Sequence, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if sequence in self.swapped:
            return max(self.swapped[sequence].num_tokens - num_computed_tokens, 0), True
        num_tokens = 0
        if self.keeps_prefixes:
            keys = self.keys(sequence, sequence.num_cacheable_tokens // self.block_size)
            num_tokens = len(self.known(keys[num_computed_tokens // self.block_size :]))
        return num_tokens * self.block_size, True

    def known(self, keys: list[bytes]) -> list[bytes]:
        """The first of these keys, as far as their blocks are on the host or on disk."""
        for i, key in enumerate(keys):
            if key not in self.tier.blocks and (self.disk is None or key not in self.disk):
                return keys[:i]
        return keys

    def update_state_after_alloc(self, sequence: Sequence, num_external_tokens: int) -> None:
        if sequence in self.swapped:
            self.swap_in(sequence, num_external_tokens)
        elif num_external_tokens:
            first = sequence.num_computed_tokens // self.block_size
            keys = self.keys(sequence, first + num_external_tokens // self.block_size)[first:]
            blocks, read = self.find(keys)
            num_disk_tokens = sum(key is not None for key in read) * self.block_size
            self.counts["num_disk_hits"] += num_disk_tokens
            num_tokens = len(blocks) * self.block_size
            self.load(sequence, blocks, read, num_tokens, keys[: len(blocks)])

    def swap_in(self, sequence: Sequence, num_tokens: int) -> None:
        """num_tokens: those that the device does not have any more."""
        swapped = self.swapped.pop(sequence)
        blocks, first = swapped.host_blocks, sequence.num_computed_tokens // self.block_size
        if num_tokens:
            own = blocks[first:]
            self.load(sequence, own, [None] * len(own), num_tokens, [])
        self.tier.pool.free(blocks[:first] if num_tokens else blocks)
        sequence.num_drafter_tokens = 0 if first else swapped.num_drafter_tokens

    def load(
        self,
        sequence: Sequence,
        blocks: list[int],
        read: list[bytes | None],
        num_tokens: int,
        keys: list[bytes],
    ) -> None:
        """Copy host blocks into a sequence's table, behind what is computed. The copy is from now on
        the owner of the host blocks."""
        first, hold = sequence.num_computed_tokens // self.block_size, self.cache.hold(sequence)
        table = sequence.block_table[first : first + len(blocks)]
        copy = Copy(0, "load", table, blocks, read)
        self.order(Transfer(copy, sequence, hold, num_tokens, keys))

    def find(self, keys: list[bytes]) -> tuple[list[int], list[bytes | None]]:
        """Become an owner of a host block for each key; those that are on disk only get a new one, as long as there
        are any. Returns the blocks, and the keys of those that must be read."""
        here = {key: self.tier.blocks[key] for key in keys if key in self.tier.blocks}
        self.tier.policy.touch(here)
        self.tier.pool.share(list(here.values()))  # before any is evicted for another
        blocks, read = [], []
        for key in keys:
            new = None if key in here else self.tier.allocate(1)
            if key not in here and new is None:
                break
            blocks.append(here.pop(key) if new is None else new[0])
            read.append(None if new is None else key)
        self.tier.pool.free(list(here.values()))
        return blocks, read

    # from the device to the host

    def build_connector_meta(self, output: "SchedulerOutput") -> list[Copy]:
        for sequence in output.num_new_tokens:
            self.save_published(sequence)
        orders, self.orders = self.orders, []
        return orders

    def save_published(self, sequence: Sequence) -> None:
        """Copy the blocks that others can find and the host does not have."""
        first, count = sequence.num_saved_blocks, sequence.num_published_blocks
        if not self.keeps_prefixes or first >= count:
            return
        sequence.num_saved_blocks = count
        keys = self.keys(sequence, count)
        new = [i for i in range(first, count) if keys[i] not in self.tier.blocks]
        blocks = self.tier.allocate(len(new)) if new else None
        if blocks:
            self.save(sequence, new, blocks, [keys[i] for i in new])
            self.tier.policy.renew(key for key in keys if key in self.tier.blocks)

    def save(
        self, sequence: Sequence, places: list[int], blocks: list[int], keys: list[bytes]
    ) -> None:
        """Copy blocks of a sequence's table. The copy becomes the owner of the host blocks."""
        for key, block in zip(keys, blocks, strict=False):
            self.tier.insert(key, block)  # what loads it is carried out later
        table = [sequence.block_table[i] for i in places]
        self.order(
            Transfer(Copy(0, "save", table, blocks), sequence, self.cache.hold(sequence), keys=keys)
        )

    def request_preempted(self, sequence: Sequence) -> bool:
        num_tokens, num_blocks = sequence.num_computed_tokens, len(sequence.block_table)
        num_blocks = min(num_blocks, self.kv.blocks_for(num_tokens))
        if not self.swaps or not num_blocks or not self.rates.swap_pays(num_blocks, num_tokens):
            return False
        self.save_published(sequence)
        count = min(sequence.num_saved_blocks, num_blocks)
        known = self.known_here(self.keys(sequence, count)) if count else {}
        self.tier.pool.share(list(known.values()))
        new = [i for i in range(num_blocks) if i not in known]
        blocks = self.tier.allocate(len(new))
        if blocks is None:
            self.tier.pool.free(list(known.values()))
            return False
        self.tier.pool.share(blocks)  # the sequence is another owner
        if new:
            self.save(sequence, new, blocks, [])
        places = known | dict(zip(new, blocks, strict=True))
        drafted = 0 if known else sequence.num_drafter_tokens  # saved before they were drafted on
        host_blocks = [places[i] for i in range(num_blocks)]
        self.swapped[sequence] = Swapped(host_blocks, num_tokens, drafted)
        self.counts["num_swapped_tokens"] += num_tokens
        return True

    def known_here(self, keys: list[bytes]) -> dict[int, int]:
        """Places among these keys, and the host blocks that have them."""
        return {i: self.tier.blocks[key] for i, key in enumerate(keys) if key in self.tier.blocks}

    def request_finished(self, sequence: Sequence) -> None:
        if sequence.block_table:
            self.save_published(sequence)
        if swapped := self.swapped.pop(sequence, None):
            self.tier.pool.free(swapped.host_blocks)

    # when copies are done

    def update_connector_output(self, finished: Iterable[Copied]) -> list[tuple[Sequence, int]]:
        loaded = []
        for done in finished:
            transfer = self.transfers.pop(done.number)
            kind = transfer.copy.kind
            if transfer.hold is not None:
                self.cache.let_go(transfer.hold)
                self.rates.observe_copy(done.num_blocks, done.seconds)
                self.counts[f"offload_bytes_{kind}"] += done.num_bytes
                self.counts[f"offload_seconds_{kind}"] += done.seconds
            if kind == "load":
                loaded.append((transfer.sequence, self.finish_load(transfer, done.num_blocks)))
            elif kind == "save" and self.disk is not None:
                self.store(transfer)
            self.tier.pool.free(transfer.copy.host_blocks)
        return loaded

    def finish_load(self, transfer: Transfer, num_blocks: int) -> int:
        """Returns how many tokens have come."""
        copy, num_tokens = transfer.copy, transfer.num_tokens
        if num_blocks < len(copy.host_blocks):
            num_tokens = num_blocks * self.block_size
        read = zip(copy.host_blocks[:num_blocks], copy.disk_keys, strict=False)
        for block, key in read:
            if key is not None and key not in self.tier.blocks:
                self.tier.insert(key, block)
        if transfer.keys:  # it was no swap
            self.counts["num_host_hits"] += num_tokens
            if not transfer.sequence.num_lost_tokens:  # it has joined for the first time
                transfer.sequence.num_cached_tokens += num_tokens
        return num_tokens

    def store(self, transfer: Transfer) -> None:
        """Write blocks that have a key to disk."""
        pairs = zip(transfer.keys, transfer.copy.host_blocks, strict=False)
        new = [(key, block) for key, block in pairs if key not in self.disk]
        if new:
            keys, blocks = [key for key, _ in new], [block for _, block in new]
            self.tier.pool.share(blocks)
            self.order(Transfer(Copy(0, "store", [], blocks, keys), None))

    def observe_step(self, num_tokens: int, seconds: float) -> None:
        self.rates.observe_step(num_tokens, seconds)

    # what there is

    def held(self) -> list[list[int]]:
        return [t.hold.blocks for t in self.transfers.values() if t.hold is not None]

    def check_integrity(self) -> None:
        """Assert that every host block is free, or owned by a key, a sequence or a copy."""
        owners = [list(self.tier.blocks.values())]
        owners += [swapped.host_blocks for swapped in self.swapped.values()]
        owners += [transfer.copy.host_blocks for transfer in self.transfers.values()]
        self.tier.pool.check_integrity(owners)
        assert len(self.tier.policy) == len(self.tier.blocks), "the policy has other keys"

    def stats(self) -> dict[str, Any]:
        numbers = {
            "num_host_blocks": self.tier.pool.num_blocks,
            "num_used_host_blocks": self.tier.pool.num_blocks - self.tier.pool.num_free,
            "host_kv_bytes": self.copies.num_bytes,
        }
        return numbers | self.counts | (self.disk.stats() if self.disk is not None else {})


COUNTS = (
    "num_swapped_tokens",
    "num_host_hits",  # tokens found on the host or on disk
    "num_disk_hits",  # tokens of these that were read from disk
    "offload_bytes_save",
    "offload_bytes_load",
    "offload_seconds_save",
    "offload_seconds_load",
)


def make_offload(config: EngineConfig, kv: KVCache, copies: NoCopies) -> NoOffload:
    """What `--offload` asks for."""
    return NoOffload() if config.offload == "off" else Offload(config, kv, copies)
