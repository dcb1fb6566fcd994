"""Keys and values that were computed once serve every sequence that begins alike.

A token's keys and values depend on all tokens before it, and on nothing else. So a block of the KV
cache is described by the tokens in it and before it, and two sequences with the same beginning can
have the same blocks in their tables. Only full blocks are shared: nothing is written to them again.

There are two ways to find them, behind one interface. In vLLM's, here, each block has a hash of its
tokens and of the hash before it, and a table leads from hash to block. A block that no sequence holds
stays in the list of free ones, and keeps what is in it until it is given out again (Kwon et al.,
2023; automatic prefix caching). SGLang's tree is in `radix_cache.py`. Either way a chain loses its
end before its beginning.
"""

import hashlib

from .block_cache import BlockCache, Match
from .kv_cache import BlockPool
from .radix_cache import RadixPrefixCache
from .sequence import Sequence


class HashPrefixCache(BlockCache):
    """vLLM's: a table of chained hashes over the pool.

    SHA-256, because a client that finds collisions could read, through the answers to its own
    prompts, what other clients have asked.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self.blocks: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}  # the same the other way round

    def key(self, before: bytes, token_bytes: bytes, is_first: bool) -> bytes:
        return hashlib.sha256(before + token_bytes).digest()

    def match(self, sequence: Sequence) -> Match:
        blocks = []
        for key in self.keys(sequence, sequence.num_cacheable_tokens):
            if key not in self.blocks:
                break
            blocks.append(self.blocks[key])
        return Match(blocks, sum(block in self.pool.free_blocks for block in blocks))

    def take(self, sequence: Sequence, match: Match) -> None:
        self.pool.share(match.blocks)
        sequence.num_published_blocks = len(match.blocks)

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Where another block has the same key already, this one stays its sequence's own: tables
        are never rewritten."""
        first, count = sequence.num_published_blocks, num_tokens // self.block_size
        if first < count:
            keys = self.keys(sequence, num_tokens, first)
            for block, key in zip(sequence.block_table[first:count], keys, strict=True):
                if key not in self.blocks:
                    self.blocks[key], self.key_of[block] = block, key
            sequence.num_published_blocks = count

    def allocate(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)  # the longest free first, published or not
        for block in blocks:
            if block in self.key_of:
                del self.blocks[self.key_of.pop(block)]
        return blocks

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        for block in sequence.block_table:
            if block in self.pool.free_blocks and block not in self.key_of:
                self.pool.hand_out_first(block)  # nothing is lost with it

    def check_integrity(self, tables: list[list[int]]) -> None:
        super().check_integrity(tables)
        turned = {block: key for key, block in self.blocks.items()}
        assert turned == self.key_of, "the two tables differ"


KINDS: dict[str, type[BlockCache]] = {
    "off": BlockCache,
    "hash": HashPrefixCache,
    "radix": RadixPrefixCache,
}


def make_block_cache(kind: str, pool: BlockPool, block_size: int) -> BlockCache:
    """kind: off, hash or radix."""
    return KINDS[kind](pool, block_size)
