"""The blocks on the host: which are free, what they are known by, and who else owns them.

The same account as a block pool keeps, with one more owner: a block that has a key is owned by its
key too, and can be found until a policy chooses it to make room. Behind the host there may be a
folder on disk, in which keys are found as well.
"""

from collections.abc import Iterable, Sequence

from common.kv_store.disk import DiskStore
from common.kv_store.eviction import POLICIES


class HostBlocks:
    """Not safe from several threads."""

    def __init__(self, num_blocks: int, policy: str, disk: DiskStore | None = None) -> None:
        """policy: lru or arc."""
        self.num_blocks, self.disk = num_blocks, disk
        self.free_blocks = list(range(num_blocks))
        self.ref_counts = [0] * num_blocks
        self.of_key: dict[bytes, int] = {}
        self.policy = POLICIES[policy](num_blocks)

    def __contains__(self, key: bytes) -> bool:
        """Whether a block is known by this key, on the host or on disk."""
        return key in self.of_key or (self.disk is not None and key in self.disk)

    def allocate(self, count: int) -> list[int] | None:
        """Become the owner of so many blocks, which may lose their keys for that; None where there
        are not so many."""
        while len(self.free_blocks) < count:
            key = self.policy.evict(lambda key: self.ref_counts[self.of_key[key]] == 1)
            if key is None:
                return None
            self.free([self.of_key.pop(key)])
        blocks = [self.free_blocks.pop() for _ in range(count)]
        self.share(blocks)
        return blocks

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more owner of each block."""
        for block in blocks:
            self.ref_counts[block] += 1

    def free(self, blocks: Iterable[int]) -> None:
        """Give up one ownership of each block."""
        for block in blocks:
            assert self.ref_counts[block] > 0, f"host block {block} is free already"
            self.ref_counts[block] -= 1
            if self.ref_counts[block] == 0:
                self.free_blocks.append(block)

    def publish(self, keys: Sequence[bytes], blocks: Sequence[int]) -> None:
        """Let blocks be found by keys that are not known on the host."""
        self.share(blocks)
        for key, block in zip(keys, blocks, strict=True):
            self.of_key[key] = block
            self.policy.insert(key)

    def forget(self, keys: Iterable[bytes], blocks: Iterable[int]) -> None:
        """These blocks are not what they were published as."""
        for key, block in zip(keys, blocks, strict=True):
            if self.of_key.get(key) == block:
                del self.of_key[key]
                self.policy.remove(key)
                self.free([block])

    def renew(self, keys: Iterable[bytes]) -> None:
        """These are of a chain that has grown."""
        self.policy.renew(key for key in keys if key in self.of_key)

    def places(self, keys: Sequence[bytes]) -> dict[int, int]:
        """Which of these keys are known on the host, by their place, and their blocks."""
        return {i: self.of_key[key] for i, key in enumerate(keys) if key in self.of_key}

    def acquire(self, keys: Sequence[bytes]) -> tuple[list[int], list[bytes | None]]:
        """Become an owner of a block for each key, for as many of the first ones as there is room.

        Returns the blocks; and for each None, or the key by which it must be read from disk first.
        """
        here = self.places(keys)
        self.policy.touch([keys[i] for i in here])
        self.share(here.values())  # before one of them is evicted for another
        blocks: list[int] = []
        for i in range(len(keys)):
            new = [here.pop(i)] if i in here else self.allocate(1)
            if new is None:
                break
            blocks += new
        self.free(here.values())
        count = len(blocks)
        read = [None if self.of_key.get(k) == b else k for k, b in zip(keys, blocks, strict=False)]
        return blocks, read[:count]

    def arrived(self, blocks: Sequence[int], read: Sequence[bytes | None]) -> None:
        """Blocks that were read from disk have their keys on the host now, too."""
        new = [(key, block) for key, block in zip(read, blocks, strict=False) if key is not None]
        for key, block in new:
            if key not in self.of_key:
                self.publish([key], [block])

    def check_integrity(self, owners: Iterable[Sequence[int]]) -> None:
        """Assert that these lists and the keys own every block that is not free, and no other."""
        counts = [0] * self.num_blocks
        for blocks in [list(self.of_key.values()), *owners]:
            for block in blocks:
                counts[block] += 1
        assert counts == self.ref_counts, "host blocks are lost, or owned by nobody"
        free = sorted(block for block, count in enumerate(counts) if count == 0)
        assert sorted(self.free_blocks) == free, "a host block is owned and free"
        assert len(self.policy) == len(self.of_key), "the policy has other keys"
