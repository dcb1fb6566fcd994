"""Which replica a request goes to. A policy is asked with those that may have it, and never waits.

`round-robin` and `least-pending` look at no prompt. A prefix cache is worth most where the requests
that share a beginning meet: `cache-aware` guesses which replica has the beginning of a prompt, and
`session` keeps a client's requests together without looking at them.
"""

import hashlib
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from itertools import count, product

from common.router.config import RouterConfig
from common.router.request import RoutedRequest

from .replicas import Replica

MAX_PIECES = 1 << 16  # known at a time, of 64 characters or 16 tokens each
VIRTUAL_NODES = 128  # places of a replica on the ring


def least_pending(replicas: Sequence[Replica]) -> Replica:
    """The least loaded; of equals the one that has had the fewest requests."""
    return min(replicas, key=lambda replica: (replica.load, replica.num_requests))


class RoundRobin:
    """One after the other."""

    def __init__(self, config: RouterConfig) -> None:
        self.turns = count()

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica]) -> Replica:
        return replicas[next(self.turns) % len(replicas)]


class LeastPending:
    """The smallest 4 * waiting + running, as vLLM's front end chooses among its engines."""

    def __init__(self, config: RouterConfig) -> None: ...

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica]) -> Replica:
        return least_pending(replicas)


class CacheAware:
    """The replica that knows the longest beginning of the prompt, unless it has too much to do.

    The router cannot see the replicas' caches. It remembers which pieces of which prompts it sent
    where, each piece under a hash of all the text up to its end, and forgets those that were used
    longest ago. A wrong guess costs a prefill and nothing else, so a fast hash is good enough. The
    limits of load, and their names, are those of SGLang's router.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.config = config
        self.known: OrderedDict[int, set[int]] = OrderedDict()  # hash: indices of replicas
        self.num_pieces = self.num_matched = 0

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica]) -> Replica:
        pieces = list(request.pieces())
        matches = {replica.index: 0 for replica in replicas}
        holders = set(matches)
        for length, piece in enumerate(pieces, start=1):
            holders = holders & self.known.get(piece, set())
            matches |= dict.fromkeys(holders, length)
        best = max(matches.values())
        chosen = least_pending([r for r in replicas if matches[r.index] == best])
        least = least_pending(replicas)
        if best <= self.config.cache_threshold * len(pieces) or self.is_too_busy(chosen, least):
            chosen = least
        self.num_pieces += len(pieces)
        self.num_matched += matches[chosen.index]
        for piece in pieces:
            self.known.setdefault(piece, set()).add(chosen.index)
            self.known.move_to_end(piece)
        while len(self.known) > MAX_PIECES:
            self.known.popitem(last=False)
        return chosen

    def is_too_busy(self, replica: Replica, least: Replica) -> bool:
        return (
            replica.load > least.load + self.config.balance_abs_threshold
            and replica.load > least.load * self.config.balance_rel_threshold
        )

    def forget(self, index: int) -> None:
        """A replica has ended, and its cache with it."""
        for indices in self.known.values():
            indices.discard(index)


class Session:
    """A session's requests go to one replica: the next on a ring of hashes.

    Each replica has many places on the ring. One more replica takes over what lies just before its
    own places, 1/N of the sessions from all of the others, and the rest stay where they are.
    """

    def __init__(self, config: RouterConfig) -> None:
        self.rings: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def choose(self, request: RoutedRequest, replicas: Sequence[Replica]) -> Replica:
        name = request.header(b"x-session-id") or request.fields.get("user")
        if not name:
            return least_pending(replicas)
        by_index = {replica.index: replica for replica in replicas}
        ring = self.ring(tuple(by_index))
        place = bisect_right(ring, (place_of(str(name)), -1)) % len(ring)
        return by_index[ring[place][1]]

    def ring(self, indices: tuple[int, ...]) -> list[tuple[int, int]]:
        """(place, index of a replica), sorted. Those that were needed last are kept."""
        if indices not in self.rings:
            if len(self.rings) >= 16:
                self.rings.clear()
            places = product(indices, range(VIRTUAL_NODES))
            self.rings[indices] = sorted((place_of(f"{i} {node}"), i) for i, node in places)
        return self.rings[indices]


def place_of(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="replace"), digest_size=8).digest())


POLICIES = {
    "round-robin": RoundRobin,
    "least-pending": LeastPending,
    "cache-aware": CacheAware,
    "session": Session,
}
