"""Keys and values that were computed once serve every sequence that begins alike.

A token's keys and values depend on all tokens before it, and on nothing else. So a block of the KV
cache is described by the tokens in it and before it, and two sequences with the same beginning can
have the same blocks in their tables. Only full blocks are shared, which nobody writes to again.

Two ways to find them, behind one interface. vLLM's: each block has a hash of its tokens and of the
hash before it; a table leads from hash to block; blocks that nobody uses stay in the list of free
ones, and keep what they hold until they are given to somebody else (Kwon et al., 2023; automatic
prefix caching). SGLang's: a tree whose edges are runs of blocks; it owns its blocks, and gives up
the leaves that were not used for longest (Zheng et al., "SGLang: Efficient Execution of Structured
Language Model Programs", NeurIPS 2024). Either way a chain loses its end before its beginning.
"""

import hashlib
import heapq
from array import array
from dataclasses import dataclass, field
from typing import Protocol

from .kv_cache import BlockPool
from .sequence import Sequence


class PrefixCache(Protocol):
    """Where sequences get their blocks, and where they leave them."""

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated; what is in some of them is forgotten then."""

    def allocate(self, count: int) -> list[int]:
        """Take `count` blocks, at most `num_free`."""

    def match(self, sequence: Sequence) -> list[int]:
        """Take the blocks of the longest beginning of a sequence that is cached.

        Never all of its tokens: the last must be computed, or there would be nothing to draw the
        next one from.
        """

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Let others find the full blocks of a sequence's first tokens, computed and final."""

    def release(self, sequence: Sequence) -> None:
        """Give up a sequence's blocks. Those that others can find stay as they are for now."""

    def check_integrity(self, tables: list[list[int]]) -> None:
        """Assert that these block tables, and the cache, own what is not free."""


class NoPrefixCache:
    """Blocks come from the pool and go back to it."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool, self.block_size = pool, block_size

    @property
    def num_free(self) -> int:
        return self.pool.num_free

    def allocate(self, count: int) -> list[int]:
        return self.pool.allocate(count)

    def match(self, sequence: Sequence) -> list[int]:
        return []

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        pass

    def release(self, sequence: Sequence) -> None:
        self.pool.free(sequence.block_table)
        sequence.num_published_blocks = 0

    def check_integrity(self, tables: list[list[int]]) -> None:
        self.pool.check_integrity(tables)

    def keys(self, sequence: Sequence, num_tokens: int) -> list[bytes]:
        """A key for each full block of a sequence's first tokens. They are made once."""
        keys, size = sequence.block_keys, self.block_size
        count = num_tokens // size
        if len(keys) < count:
            data = array("i", sequence.tokens(len(keys) * size, count * size)).tobytes()
            step = len(data) // (count - len(keys))
            for begin in range(0, len(data), step):
                before = keys[-1] if keys else root_key(sequence.cache_salt)
                keys.append(self.key(before, data[begin : begin + step], not keys))
        return keys[:count]

    def key(self, before: bytes, token_bytes: bytes, is_first: bool) -> bytes:
        """The key of a block, from the key before it and its tokens."""
        raise NotImplementedError


def root_key(salt: str | None) -> bytes:
    """What the first block's key begins with. Sequences with different salts share nothing.

    A salt is hashed twice: what is hashed last is shorter than what is hashed for any block. Else a
    client could choose a salt whose hash is the key of a block of somebody else.
    """
    if salt is None:
        return bytes(32)
    digest = hashlib.sha256(salt.encode("utf-8", "surrogatepass")).digest()
    return hashlib.sha256(digest).digest()


class HashPrefixCache(NoPrefixCache):
    """vLLM's: a table of chained hashes over the pool.

    SHA-256, because with a hash for which somebody can find collisions he could read, through the
    answers to his own prompts, what others have asked.
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self.blocks: dict[bytes, int] = {}
        self.key_of: dict[int, bytes] = {}  # the same the other way round

    def key(self, before: bytes, token_bytes: bytes, is_first: bool) -> bytes:
        return hashlib.sha256(before + token_bytes).digest()

    def match(self, sequence: Sequence) -> list[int]:
        blocks = []
        for key in self.keys(sequence, sequence.num_cacheable_tokens):
            if key not in self.blocks:
                break
            blocks.append(self.blocks[key])
        self.pool.share(blocks)
        sequence.num_published_blocks = len(blocks)
        return blocks

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        """Where another block has the same key already, this one stays its sequence's own: tables
        are never rewritten."""
        first, count = sequence.num_published_blocks, num_tokens // self.block_size
        if first < count:
            keys = self.keys(sequence, num_tokens)
            for block, key in zip(sequence.block_table[first:count], keys[first:], strict=True):
                if key not in self.blocks:
                    self.blocks[key], self.key_of[block] = block, key
            sequence.num_published_blocks = count

    def allocate(self, count: int) -> list[int]:
        blocks = self.pool.allocate(count)  # those that became free first, used or not
        for block in blocks:
            if block in self.key_of:
                del self.blocks[self.key_of.pop(block)]
        return blocks

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        for block in sequence.block_table:
            if block in self.pool.free_blocks and block not in self.key_of:
                self.pool.free_blocks.move_to_end(block, last=False)  # nothing is lost with it

    def check_integrity(self, tables: list[list[int]]) -> None:
        super().check_integrity(tables)
        turned = {block: key for key, block in self.blocks.items()}
        assert turned == self.key_of, "the two tables differ"


@dataclass(eq=False)
class Node:
    """A run of blocks that were only ever found together; its children differ in their first."""

    parent: "Node | None"
    keys: list[bytes]
    blocks: list[int]
    children: dict[bytes, "Node"] = field(default_factory=dict)
    num_locks: int = 0  # sequences that use it or something below it
    last_used: int = 0  # a number of the tree's clock

    @property
    def is_leaf(self) -> bool:
        """Whether it may be given up: nobody uses it, nothing is below it."""
        return not self.num_locks and not self.children and self.parent is not None


class RadixPrefixCache(NoPrefixCache):
    """SGLang's: a radix tree that owns its blocks, of which sequences lock what they use."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self.root = Node(None, [], [])
        self.ends: dict[Sequence, Node] = {}  # where each sequence's way down the tree ends so far
        self.leaves: list[tuple[int, int, Node]] = []  # a heap by last use, with outdated entries
        self.clock = 0
        self.num_nodes = 0
        self.num_evictable = 0  # blocks of nodes that nobody has locked

    def key(self, before: bytes, token_bytes: bytes, is_first: bool) -> bytes:
        return before + token_bytes if is_first else token_bytes

    @property
    def num_free(self) -> int:
        return self.pool.num_free + self.num_evictable

    def match(self, sequence: Sequence) -> list[int]:
        node, count = self.walk(self.root, self.keys(sequence, sequence.num_cacheable_tokens))
        self.lock(node)
        self.ends[sequence], sequence.num_published_blocks = node, count
        runs = []
        while node.parent is not None:
            runs.append(node.blocks)
            node = node.parent
        blocks = [block for run in reversed(runs) for block in run]
        self.pool.share(blocks)
        return blocks

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        first, count = sequence.num_published_blocks, num_tokens // self.block_size
        if first >= count:
            return
        keys, end = self.keys(sequence, num_tokens), self.ends[sequence]
        node, found = self.walk(end, keys[first:])
        self.replace(node, end, sequence.block_table[first : first + found])
        keys, blocks = keys[first + found :], sequence.block_table[first + found : count]
        if keys:
            self.pool.share(blocks)  # the tree is their second owner
            is_own = node is end and node.num_locks == 1 and not node.children
            if is_own and node is not self.root:
                node.keys += keys
                node.blocks += blocks
            else:
                node.children[keys[0]] = node = Node(node, keys, blocks, last_used=self.clock)
                self.num_nodes += 1
                self.num_evictable += len(blocks)  # until it is locked, below
        self.lock(node)
        self.unlock(end)
        self.ends[sequence], sequence.num_published_blocks = node, count

    def replace(self, node: Node, end: Node, blocks: list[int]) -> None:
        """Between `end` and `node` the tree has what a sequence has computed once more: of what
        nobody uses it takes the sequence's blocks, and frees its own. No table is rewritten."""
        while node is not end:
            place = len(blocks) - len(node.blocks)
            own, blocks = blocks[place:], blocks[:place]
            if not node.num_locks:
                self.pool.share(own)
                self.pool.free(node.blocks)
                node.blocks = own
            node = node.parent

    def allocate(self, count: int) -> list[int]:
        while self.pool.num_free < count:
            self.evict(count - self.pool.num_free)
        return self.pool.allocate(count)

    def release(self, sequence: Sequence) -> None:
        super().release(sequence)
        self.clock += 1
        self.unlock(self.ends.pop(sequence))

    def walk(self, node: Node, keys: list[bytes]) -> tuple[Node, int]:
        """Down from a node as far as the keys lead: the node at whose end they part from the tree,
        which is split for that, and how many of them were found."""
        self.clock += 1
        count = 0
        while count < len(keys) and keys[count] in node.children:
            node = node.children[keys[count]]
            same = common_length(node.keys, keys[count:])
            if same < len(node.keys):
                node = self.split(node, same)
            node.last_used = self.clock
            count += same
        return node, count

    def split(self, node: Node, place: int) -> Node:
        """Cut a node in two; returns the upper one. Who has locked the node has locked both."""
        upper = Node(node.parent, node.keys[:place], node.blocks[:place], num_locks=node.num_locks)
        node.parent.children[upper.keys[0]] = upper
        node.parent, node.keys, node.blocks = upper, node.keys[place:], node.blocks[place:]
        upper.children[node.keys[0]] = node
        self.num_nodes += 1
        return upper

    def lock(self, node: Node) -> None:
        """Keep a node and all above it."""
        while node.parent is not None:
            if node.num_locks == 0:
                self.num_evictable -= len(node.blocks)
            node.num_locks += 1
            node = node.parent

    def unlock(self, node: Node) -> None:
        """Undo one `lock`; until now all of it was in use."""
        while node.parent is not None:
            node.last_used = self.clock
            node.num_locks -= 1
            if node.num_locks == 0:
                self.num_evictable += len(node.blocks)
                self.note_leaf(node)
            node = node.parent

    def note_leaf(self, node: Node) -> None:
        """Remember that a node may be given up, if it may."""
        if node.is_leaf:
            heapq.heappush(self.leaves, (node.last_used, id(node), node))
        if len(self.leaves) > 2 * self.num_nodes + 64:
            self.leaves = [entry for entry in set(self.leaves) if self.is_current(entry)]
            heapq.heapify(self.leaves)

    def is_current(self, entry: tuple[int, int, Node]) -> bool:
        last_used, _, node = entry
        return node.is_leaf and node.last_used == last_used

    def evict(self, count: int) -> None:
        """Free up to `count` blocks, from the end of the leaf that was not used for longest."""
        entry = heapq.heappop(self.leaves)
        if not self.is_current(entry):
            return
        node, parent = entry[2], entry[2].parent
        place = max(len(node.blocks) - count, 0)
        self.num_evictable -= len(node.blocks) - place
        self.pool.free(node.blocks[place:])
        if place > 0:
            node.keys, node.blocks = node.keys[:place], node.blocks[:place]
            self.note_leaf(node)
        else:
            del parent.children[node.keys[0]]
            node.parent = None
            self.num_nodes -= 1
            self.note_leaf(parent)

    def check_integrity(self, tables: list[list[int]]) -> None:
        nodes, runs = [self.root], []
        for node in nodes:  # which grows
            for key, child in node.children.items():
                assert child.parent is node and child.keys[0] == key, "a child in the wrong place"
                assert len(child.keys) == len(child.blocks), f"{len(child.blocks)} blocks"
                runs.append(child.blocks)
            nodes += node.children.values()
            ends = sum(end is node for end in self.ends.values())
            below = sum(child.num_locks for child in node.children.values())
            if node is not self.root:
                assert node.num_locks == ends + below, f"{node.num_locks} locks, {ends} + {below}"
        unlocked = [node for node in nodes[1:] if not node.num_locks]
        assert self.num_nodes == len(nodes) - 1, f"{self.num_nodes} nodes, {len(nodes) - 1}"
        assert self.num_evictable == sum(len(node.blocks) for node in unlocked), self.num_evictable
        noted = {entry[2] for entry in self.leaves if self.is_current(entry)}
        assert all(node in noted for node in unlocked if node.is_leaf), "a leaf is not noted"
        self.pool.check_integrity(tables + runs)


def common_length(first: list[bytes], second: list[bytes]) -> int:
    """How many items two lists have in common before they differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))


KINDS: dict[str, type[NoPrefixCache]] = {
    "off": NoPrefixCache,
    "hash": HashPrefixCache,
    "radix": RadixPrefixCache,
}


def make_prefix_cache(kind: str, pool: BlockPool, block_size: int) -> PrefixCache:
    """kind: off, hash or radix."""
    return KINDS[kind](pool, block_size)
