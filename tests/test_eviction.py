"""Eviction policies against models that are too slow to use and too simple to be wrong."""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.kv_store import eviction

KEYS = [b"%d" % number for number in range(12)]


def always(key: bytes) -> bool:
    return True


class SlowLru:
    """When each key was used last; the least is looked for among all."""

    def __init__(self, capacity: int) -> None:
        self.used: dict[bytes, int] = {}
        self.now = 0

    def use(self, key: bytes) -> None:
        self.now += 1
        self.used[key] = self.now

    def keys(self) -> set[bytes]:
        return set(self.used)

    def insert(self, key: bytes) -> None:
        self.use(key)

    def touch(self, keys: list[bytes]) -> None:
        for key in keys[::-1]:
            if key in self.used:
                self.use(key)

    def renew(self, keys: list[bytes]) -> None:
        self.touch(keys)

    def evict(self, can_evict: Callable[[bytes], bool]) -> bytes | None:
        victims = sorted(filter(can_evict, self.used), key=lambda key: self.used[key])
        if victims:
            del self.used[victims[0]]
        return victims[0] if victims else None

    def remove(self, key: bytes) -> None:
        self.used.pop(key, None)


class SlowArc:
    """The paper's four lists under its names, newest last; its cases I to IV in its words."""

    def __init__(self, capacity: int) -> None:
        self.c, self.p = capacity, 0.0
        self.t1: list[bytes] = []
        self.t2: list[bytes] = []
        self.b1: list[bytes] = []
        self.b2: list[bytes] = []

    def keys(self) -> set[bytes]:
        return {*self.t1, *self.t2}

    def insert(self, key: bytes) -> None:
        if key in self.b1:  # case II
            ratio = 1 if len(self.b1) >= len(self.b2) else len(self.b2) / len(self.b1)
            self.p = min(self.c, self.p + ratio)
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:  # case III
            ratio = 1 if len(self.b2) >= len(self.b1) else len(self.b1) / len(self.b2)
            self.p = max(0, self.p - ratio)
            self.b2.remove(key)
            self.t2.append(key)
        else:  # case IV
            if len(self.t1) + len(self.b1) == self.c and self.b1:
                self.b1.pop(0)
            elif len(self.t1 + self.t2 + self.b1 + self.b2) == 2 * self.c:
                self.b2.pop(0)
            self.t1.append(key)

    def touch(self, keys: list[bytes]) -> None:
        for key in keys[::-1]:
            for own in (self.t1, self.t2):
                if key in own:  # case I
                    own.remove(key)
                    self.t2.append(key)
                    break

    def renew(self, keys: list[bytes]) -> None:
        """Not of the paper: as new as can be, each in its own list."""
        for key in keys[::-1]:
            for own in (self.t1, self.t2):
                if key in own:
                    own.remove(key)
                    own.append(key)

    def evict(self, can_evict: Callable[[bytes], bool]) -> bytes | None:  # REPLACE
        for name in "12" if self.t1 and len(self.t1) > self.p else "21":
            own, ghosts = getattr(self, "t" + name), getattr(self, "b" + name)
            for key in own:
                if can_evict(key):
                    own.remove(key)
                    ghosts.append(key)
                    return key
        return None

    def remove(self, key: bytes) -> None:
        for own in (self.t1, self.t2, self.b1, self.b2):
            if key in own:
                own.remove(key)


SLOW = {"lru": SlowLru, "arc": SlowArc}


class Policies(RuleBasedStateMachine):
    """A policy and its model, side by side, as a tier with `capacity` blocks would use it."""

    kind = ""

    @initialize(capacity=st.integers(1, 6))
    def begin(self, capacity: int) -> None:
        self.capacity = capacity
        self.policy: Any = eviction.POLICIES[self.kind](capacity)
        self.slow: Any = SLOW[self.kind](capacity)

    @rule(key=st.sampled_from(KEYS), pinned=st.sets(st.sampled_from(KEYS), max_size=3))
    def use(self, key: bytes, pinned: set[bytes]) -> None:
        """A hit, or a miss that makes room first."""
        if key in self.policy:
            self.policy.touch(iter([key]))
            self.slow.touch([key])
            return
        if len(self.policy) == self.capacity:
            self.evict(pinned)
        if len(self.policy) < self.capacity:
            self.policy.insert(key)
            self.slow.insert(key)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def touch_many(self, keys: list[bytes]) -> None:
        self.policy.touch(keys)
        self.slow.touch(keys)

    @rule(keys=st.lists(st.sampled_from(KEYS), max_size=4))
    def renew(self, keys: list[bytes]) -> None:
        self.policy.renew(iter(keys))
        self.slow.renew(keys)

    @rule(pinned=st.sets(st.sampled_from(KEYS)))
    def evict(self, pinned: set[bytes]) -> None:
        victim = self.policy.evict(lambda key: key not in pinned)
        assert victim not in pinned
        assert victim == self.slow.evict(lambda key: key not in pinned)

    @rule(key=st.sampled_from(KEYS))
    def remove(self, key: bytes) -> None:
        self.policy.remove(key)
        self.slow.remove(key)

    @precondition(lambda self: len(self.policy))
    @rule(data=st.data())
    def insert_twice(self, data: Any) -> None:
        key = data.draw(st.sampled_from(sorted(self.slow.keys())))
        with pytest.raises(AssertionError):
            self.policy.insert(key)

    @invariant()
    def same_keys(self) -> None:
        if hasattr(self, "slow"):
            assert {key for key in KEYS if key in self.policy} == self.slow.keys()
            assert len(self.policy) == len(self.slow.keys()) <= self.capacity


class LruMachine(Policies):
    kind = "lru"


class ArcMachine(Policies):
    kind = "arc"

    @invariant()
    def same_lists(self) -> None:
        if hasattr(self, "slow"):
            arc, slow, c = self.policy, self.slow, self.capacity
            lists = [arc.once, arc.again, arc.once_ghosts, arc.again_ghosts]
            assert list(map(list, lists)) == [slow.t1, slow.t2, slow.b1, slow.b2]
            assert arc.target == slow.p and 0 <= arc.target <= c
            assert len(slow.t1) + len(slow.b1) <= c, "the paper's A.1"
            assert sum(map(len, lists)) <= 2 * c, "the paper's A.2"
            assert len({key for keys in lists for key in keys}) == sum(map(len, lists))


for machine in (LruMachine, ArcMachine):
    machine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLru = LruMachine.TestCase
TestArc = ArcMachine.TestCase


@pytest.mark.parametrize("kind", ["lru", "arc"])
@pytest.mark.parametrize("capacity", [1, 2, 5, 16])
def test_long_runs(kind: str, capacity: int) -> None:
    """Thousands of requests, some keys more popular than others, as the paper's ghosts need them."""
    draw = random.Random(capacity)
    policy, slow, steps = eviction.POLICIES[kind](capacity), SLOW[kind](capacity), set()
    for _ in range(4000):
        key = b"%d" % int(draw.paretovariate(0.6) % (4 * capacity))
        if key in policy:
            policy.touch([key])
            slow.touch([key])
            continue
        if len(policy) == capacity:
            pinned = {draw.choice(sorted(slow.keys()))} if draw.random() < 0.2 else set()
            victim = policy.evict(lambda key, pinned=pinned: key not in pinned)
            assert victim == slow.evict(lambda key, pinned=pinned: key not in pinned)
        if len(policy) < capacity:
            before = getattr(policy, "target", 0)
            policy.insert(key)
            slow.insert(key)
            assert getattr(policy, "target", 0) == getattr(slow, "p", 0)
            steps.add(getattr(policy, "target", 0) - before)
    assert kind == "lru" or capacity < 16 or (max(steps) > 1 and min(steps) < -1), steps


def hit_rate(kind: str, capacity: int, keys: Iterator[int]) -> float:
    policy, num_hits, num = eviction.POLICIES[kind](capacity), 0, 0
    for number in keys:
        key, num = b"%d" % number, num + 1
        if key in policy:
            num_hits += 1
            policy.touch([key])
            continue
        if len(policy) == capacity:
            assert policy.evict(always) is not None
        policy.insert(key)
    return num_hits / num


def with_scans() -> Iterator[int]:
    """40 keys that are asked for all the time, and between them long scans of keys seen once."""
    draw, new = random.Random(1), 1000
    for _ in range(60):
        yield from (draw.randrange(40) for _ in range(150))
        yield from range(new, new := new + 100)


def recent() -> Iterator[int]:
    """A window that wanders: what was asked for lately comes again, and then never more."""
    draw = random.Random(2)
    for now in range(12000):
        yield now // 10 + draw.randrange(40)


def test_a_scan_passes_by_what_is_used_again() -> None:
    """Hot keys are 60% of the requests; a scan is twice what the tier holds."""
    lru, arc = (hit_rate(kind, 50, with_scans()) for kind in ("lru", "arc"))
    assert arc > lru + 0.1
    assert arc > 0.55, "of 0.6 that can be had"


def test_arc_is_no_worse_where_recency_is_all() -> None:
    lru, arc = (hit_rate(kind, 50, recent()) for kind in ("lru", "arc"))
    assert arc > lru - 0.02


@pytest.mark.parametrize("kind", ["lru", "arc"])
@pytest.mark.parametrize("how", ["touch", "renew"])
def test_a_chain_loses_its_end_first(kind: str, how: str) -> None:
    policy = eviction.POLICIES[kind](8)
    for key in KEYS[:4]:
        policy.insert(key)
    getattr(policy, how)(KEYS[:4])
    policy.insert(KEYS[5])
    victims = [policy.evict(lambda key: key != KEYS[5]) for _ in range(5)]
    assert victims == [KEYS[3], KEYS[2], KEYS[1], KEYS[0], None]


@pytest.mark.parametrize("kind", ["lru", "arc"])
def test_a_removed_key_comes_back_as_a_stranger(kind: str) -> None:
    """Removed, not evicted: its return must not move ARC's border."""
    policy = eviction.POLICIES[kind](2)
    policy.insert(KEYS[0])
    policy.insert(KEYS[1])
    assert policy.evict(always) == KEYS[0]
    policy.remove(KEYS[0])
    policy.insert(KEYS[0])
    assert policy.evict(always) == KEYS[1], "the older of two that were used once"
    assert KEYS[0] in policy and KEYS[1] not in policy
