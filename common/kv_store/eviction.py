"""Which block the host tier forgets when it is full: by recency alone, or by recency and frequency.

`lru` forgets the block that was unused for longest. One long scan, of blocks that nobody asks for
again, empties it. `arc` (Megiddo and Modha, "ARC: A Self-Tuning, Low Overhead Replacement Cache",
FAST 2003) keeps two lists, of blocks that were used once and of blocks that were used again, and
remembers the keys of what it has lately forgotten of each. A forgotten key that comes back says
which of the two lists is too short, and moves the border between them. A scan passes through the
first list alone.

A policy knows keys, not blocks, and stores nothing else. All operations take constant time, but for
the keys that cannot be evicted: a search for a victim passes over them.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable

Keys = OrderedDict[bytes, None]  # the one unused for longest first


class Lru:
    """The key that was unused for longest goes first."""

    def __init__(self, capacity: int) -> None:
        """capacity: how many keys there are at most. It is the caller that keeps to it."""
        self.keys: Keys = OrderedDict()

    def __len__(self) -> int:
        return len(self.keys)

    def __contains__(self, key: bytes) -> bool:
        return key in self.keys

    def insert(self, key: bytes) -> None:
        """A key that is not known is there now, and is the newest."""
        assert key not in self, key
        self.keys[key] = None

    def touch(self, keys: Iterable[bytes]) -> None:
        """These were used, a chain's beginning first: its end is evicted before its beginning. Keys
        that are not there are passed over."""
        for key in reversed(list(keys)):
            if key in self.keys:
                self.keys.move_to_end(key)

    def renew(self, keys: Iterable[bytes]) -> None:
        """A chain has grown: all of it is new, and was not used for that."""
        self.touch(keys)

    def evict(self, can_evict: Callable[[bytes], bool]) -> bytes | None:
        """Choose a key of those that can go, and forget it. None: there is none."""
        victim = next(filter(can_evict, self.keys), None)
        if victim is not None:
            del self.keys[victim]
        return victim

    def remove(self, key: bytes) -> None:
        """Forget a key as if it had never been there."""
        self.keys.pop(key, None)


class Arc:
    """Two lists of keys, and the ghosts of each: keys that were evicted from it.

    T1 and T2, B1 and B2 in the paper. Of `capacity` keys about `target` are in the first list. Here a
    victim is chosen before the key is known that comes in its place. So a ghost's return moves the
    border for the evictions after its own; otherwise this is the paper's algorithm.
    """

    def __init__(self, capacity: int) -> None:
        """capacity: how many keys there are at most, and how many ghosts. The caller keeps to it."""
        self.capacity, self.target = capacity, 0.0
        self.once: Keys = OrderedDict()
        self.again: Keys = OrderedDict()
        self.once_ghosts: Keys = OrderedDict()
        self.again_ghosts: Keys = OrderedDict()

    def __len__(self) -> int:
        return len(self.once) + len(self.again)

    def __contains__(self, key: bytes) -> bool:
        return key in self.once or key in self.again

    def insert(self, key: bytes) -> None:
        """A key that is not known is there now. A ghost's return counts as its second use."""
        assert key not in self, key
        num_once, num_again = len(self.once_ghosts), len(self.again_ghosts)
        if key in self.once_ghosts:
            self.target = min(self.target + max(1, num_again / num_once), self.capacity)
            del self.once_ghosts[key]
            self.again[key] = None
        elif key in self.again_ghosts:
            self.target = max(self.target - max(1, num_once / num_again), 0)
            del self.again_ghosts[key]
            self.again[key] = None
        else:
            self.once[key] = None
        self.forget_ghosts()

    def forget_ghosts(self) -> None:
        """The first list and its ghosts are `capacity` keys at most, all four lists twice as many."""
        while self.once_ghosts and len(self.once) + len(self.once_ghosts) > self.capacity:
            self.once_ghosts.popitem(last=False)
        num_ghosts = 2 * self.capacity - len(self)
        while self.again_ghosts and len(self.once_ghosts) + len(self.again_ghosts) > num_ghosts:
            self.again_ghosts.popitem(last=False)

    def touch(self, keys: Iterable[bytes]) -> None:
        """As of `Lru`. What was used once was used again now."""
        for key in reversed(list(keys)):
            if key in self:
                self.once.pop(key, None)
                self.again[key] = None
                self.again.move_to_end(key)

    def renew(self, keys: Iterable[bytes]) -> None:
        for key in reversed(list(keys)):
            if key in self:
                (self.once if key in self.once else self.again).move_to_end(key)

    def evict(self, can_evict: Callable[[bytes], bool]) -> bytes | None:
        """As of `Lru`: from the first list while it is longer than its share, else from the second;
        from the other where none of the chosen list can go."""
        lists = [(self.once, self.once_ghosts), (self.again, self.again_ghosts)]
        for keys, ghosts in lists if len(self.once) > self.target else reversed(lists):
            victim = next(filter(can_evict, keys), None)
            if victim is not None:
                del keys[victim]
                ghosts[victim] = None
                return victim
        return None

    def remove(self, key: bytes) -> None:
        """Forget a key as if it had never been there, its ghost too."""
        for keys in (self.once, self.again, self.once_ghosts, self.again_ghosts):
            keys.pop(key, None)


POLICIES: dict[str, type[Lru] | type[Arc]] = {"lru": Lru, "arc": Arc}
