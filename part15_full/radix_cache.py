"""SGLang's prefix cache: a tree whose edges are runs of blocks.

The tree is one owner of its blocks; sequences that use them are others, and lock their path. What no
sequence has locked can be evicted, the leaf first that was not used for longest (Zheng et al.,
"SGLang: Efficient Execution of Structured Language Model Programs", NeurIPS 2024).
"""

import heapq
from dataclasses import dataclass, field

from .block_cache import BlockCache, Hold, Match
from .kv_cache import BlockPool
from .sequence import Sequence


@dataclass(eq=False)
class Node:
    """A run of blocks that were only ever found together; its children differ in their first."""

    parent: "Node | None"
    keys: list[bytes]
    blocks: list[int]
    children: dict[bytes, "Node"] = field(default_factory=dict)
    num_locks: int = 0  # sequences and holds that use it or something below it
    last_used: int = 0  # a number of the tree's clock

    @property
    def can_evict(self) -> bool:
        """Whether no sequence uses it and nothing is below it."""
        return not self.num_locks and not self.children and self.parent is not None


class RadixPrefixCache(BlockCache):
    """SGLang's: a radix tree that owns its blocks, of which sequences lock what they use."""

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        super().__init__(pool, block_size)
        self.root = Node(None, [], [])
        # where each sequence's way down the tree ends so far
        self.ends: dict[Sequence | Hold, Node] = {}
        self.leaves: list[tuple[int, int, Node]] = []  # a heap by last use, with outdated entries
        self.clock = 0
        self.num_nodes = 0
        self.num_evictable = 0  # blocks of nodes that are not locked

    def key(self, before: bytes, token_bytes: bytes, is_first: bool) -> bytes:
        return before + token_bytes if is_first else token_bytes

    @property
    def num_free(self) -> int:
        return self.pool.num_free + self.num_evictable

    def match(self, sequence: Sequence) -> Match:
        end, _ = self.walk(self.root, self.keys(sequence, sequence.num_cacheable_tokens))
        runs, num_free, node = [], 0, end
        while node.parent is not None:
            runs.append(node.blocks)
            num_free += 0 if node.num_locks else len(node.blocks)
            node = node.parent
        return Match([block for run in reversed(runs) for block in run], num_free, end)

    def take(self, sequence: Sequence, match: Match) -> None:
        self.lock(match.node)
        self.pool.share(match.blocks)
        self.ends[sequence] = match.node
        sequence.num_published_blocks = len(match.blocks)

    def publish(self, sequence: Sequence, num_tokens: int) -> None:
        first, count = sequence.num_published_blocks, num_tokens // self.block_size
        if first >= count:
            return
        keys, end = self.keys(sequence, num_tokens, first), self.ends[sequence]
        node, found = self.walk(end, keys)
        self.replace(node, end, sequence.block_table[first : first + found])
        keys, blocks = keys[found:], sequence.block_table[first + found : count]
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
        """Between `end` and `node` the tree has what a sequence has computed once more. Where no
        sequence uses the tree's blocks, it takes this sequence's and frees its own. No table is
        rewritten."""
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

    def hold(self, sequence: Sequence, blocks: list[int] | None = None) -> Hold:
        hold, end = super().hold(sequence, blocks), self.ends[sequence]
        self.lock(end)
        self.ends[hold] = end
        return hold

    def let_go(self, hold: Hold) -> None:
        super().let_go(hold)
        self.unlock(self.ends.pop(hold))

    def walk(self, node: Node, keys: list[bytes]) -> tuple[Node, int]:
        """Down from a node as far as the keys lead: the node at whose end they part from the tree,
        which is split for that, and how many of them were found."""
        count = 0
        while count < len(keys) and keys[count] in node.children:
            node = node.children[keys[count]]
            same = common_length(node.keys, keys[count:])
            if same < len(node.keys):
                node = self.split(node, same)
            count += same
        return node, count

    def split(self, node: Node, place: int) -> Node:
        """Cut a node in two; returns the upper one. A sequence that locked the node locks both."""
        upper = Node(node.parent, node.keys[:place], node.blocks[:place])
        upper.num_locks, upper.last_used = node.num_locks, node.last_used
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
        """Put a node into the heap if it can be evicted."""
        if node.can_evict:
            heapq.heappush(self.leaves, (node.last_used, id(node), node))
        if len(self.leaves) > 2 * self.num_nodes + 64:
            self.leaves = [entry for entry in set(self.leaves) if self.is_current(entry)]
            heapq.heapify(self.leaves)

    def is_current(self, entry: tuple[int, int, Node]) -> bool:
        last_used, _, node = entry
        return node.can_evict and node.last_used == last_used

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
        assert all(node in noted for node in unlocked if node.can_evict), "a leaf is not noted"
        self.pool.check_integrity(tables + runs)


def common_length(first: list[bytes], second: list[bytes]) -> int:
    """How many items two lists have in common before they differ."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(first), len(second)))
