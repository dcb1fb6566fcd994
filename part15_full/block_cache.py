"""Where sequences get their blocks and where they leave them, with or without a memory.

A block that can be shared has a key, made of the tokens in it and before it. How keys lead to blocks
is the business of the caches that build on this: `prefix_cache.py` and `radix_cache.py`.
"""

import hashlib
from array import array
from dataclasses import dataclass, field
from typing import Any

from .kv_cache import BlockPool
from .sequence import Sequence


@dataclass(frozen=True)
class Match:
    """The cached blocks of a sequence's longest known beginning."""

    blocks: list[int] = field(default_factory=list)
    num_free: int = 0  # of them that count as free until they are taken
    node: Any = None  # of a radix tree, where the way down ends


@dataclass(eq=False)
class Hold:
    """The blocks that a sequence had, kept for a copy that is under way."""

    blocks: list[int]


class BlockCache:
    """Where sequences get their blocks, and where they leave them. This one remembers nothing."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool, self.block_size = pool, block_size

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated; what is in some of them is forgotten then."""
        return self.pool.num_free

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, at most `num_free`."""
        return self.pool.allocate(count)

    def match(self, sequence: Sequence) -> Match:
        """Find the longest beginning of a sequence that is cached. Nothing is taken yet.

        Never all of its tokens: the last must be computed, or there would be nothing to draw the
        next one from.
        """
        return Match()

    def take(self, sequence: Sequence, match: Match) -> None:
        """Become an owner of the blocks that were just found."""

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the full blocks of a sequence's first tokens, computed and final."""

    def release(self, sequence: Sequence) -> None:
        """Give up a sequence's blocks. Published blocks keep what is in them for now."""
        self.pool.free(sequence.block_table)
        sequence.num_published_blocks = 0

    def hold(self, sequence: Sequence, blocks: list[int] | None = None) -> Hold:
        """Become one more owner of blocks of a sequence, whatever becomes of the sequence.

        blocks: none that it publishes later; all where it publishes no more.
        """
        hold = Hold(list(sequence.block_table if blocks is None else blocks))
        self.pool.share(hold.blocks)
        return hold

    def let_go(self, hold: Hold) -> None:
        """Own them no longer."""
        self.pool.free(hold.blocks)

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Assert that these block tables, and the cache, own what is not free."""
        self.pool.check_integrity(tables)

    def keys(self, sequence: Sequence, num_tokens: int, first: int = 0) -> list[bytes]:
        """A key for each full block of a sequence's first tokens, from block `first` on. They are made
        once."""
        keys, size = sequence.block_keys, self.block_size
        count = num_tokens // size
        if len(keys) < count:
            data = array("i", sequence.tokens(len(keys) * size, count * size)).tobytes()
            step = len(data) // (count - len(keys))
            for begin in range(0, len(data), step):
                before = keys[-1] if keys else root_key(sequence.request.cache_salt)
                keys.append(self.key(before, data[begin : begin + step], not keys))
        return keys[first:count]

    def key(self, before: bytes, token_bytes: bytes, is_first: bool) -> bytes:
        """The key of a block, from the key before it and its tokens."""
        raise NotImplementedError


def root_key(salt: str | None) -> bytes:
    """What the first block's key begins with. Sequences with different salts share nothing.

    A salt is hashed twice: what is hashed last is shorter than what is hashed for any block. With one
    hash a client could choose a salt whose hash is the key of another client's block.
    """
    if salt is None:
        return bytes(32)
    digest = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(digest).digest()
