"""Part 12's exercises: these fail until you do them. Run with `pytest -m exercise`."""

import random
from typing import Any

import pytest

from common.kv_store.eviction import POLICIES
from common.testing.played_device import Disk
from common.testing.played_engine import Rig

pytestmark = pytest.mark.exercise


def prompt(number: int, length: int) -> list[int]:
    return [(7 * i + 11 * number) % 90 + 2 for i in range(length)]


# 1. One list and one bit.


class SlowSieve:
    """The paper's algorithm on a list: the newest key first, the hand moves to the newer ones."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.visited: set[bytes] = set()
        self.hand: bytes | None = None

    def insert(self, key: bytes) -> None:
        self.keys.insert(0, key)

    def evict(self) -> bytes:
        key = self.hand if self.hand is not None else self.keys[-1]
        while key in self.visited:
            self.visited.remove(key)
            place = self.keys.index(key)
            key = self.keys[place - 1] if place else self.keys[-1]
        place = self.keys.index(key)
        self.hand = self.keys[place - 1] if place else None
        del self.keys[place]
        return key


@pytest.mark.parametrize("capacity", [1, 2, 7, 30])
def test_sieve(capacity: int) -> None:
    draw, policy, slow = random.Random(capacity), POLICIES["sieve"](capacity), SlowSieve()
    for _ in range(3000):
        key = b"%d" % int(draw.paretovariate(0.6) % (4 * capacity))
        assert (key in policy) == (key in slow.keys) and len(policy) == len(slow.keys)
        if key in policy:
            policy.touch([key])
            slow.visited.add(key)
            continue
        if len(policy) == capacity:
            assert policy.evict(lambda key: True) == slow.evict()
        policy.insert(key)
        slow.insert(key)


def test_sieve_passes_over_what_cannot_go() -> None:
    policy = POLICIES["sieve"](4)
    keys = [b"a", b"b", b"c", b"d"]
    for key in keys:
        policy.insert(key)
    policy.touch([b"b"])
    assert policy.evict(lambda key: key != b"a") == b"c"
    policy.remove(b"d")
    assert policy.evict(lambda key: False) is None
    left = {policy.evict(lambda key: True), policy.evict(lambda key: True)}
    assert left == {b"a", b"b"} and policy.evict(lambda key: True) is None


# 2. Half is better than nothing.


@pytest.mark.parametrize("kind", ["hash", "radix", "off"])
@pytest.mark.parametrize("host_blocks", [1, 2, 3, 5])
def test_as_much_is_swapped_as_the_host_has_room_for(kind: str, host_blocks: int) -> None:
    """Two sequences of 10 blocks on a device of 12; the host has fewer than the loser holds."""
    rig = Rig(host_blocks, offload="swap", prefix_cache=kind, block_size=2, num_blocks=12)
    rig.add("a", prompt(0, 8), 12)
    rig.add("b", prompt(1, 8), 12)
    lost, preempt = [], rig.engine.scheduler.preempt

    def noted(sequence: Any) -> None:
        lost.append(sequence.num_computed_tokens)
        preempt(sequence)

    rig.engine.scheduler.preempt = noted
    rig.finish()  # and holds every token and every block against what they should be
    assert lost and all(count > 2 * host_blocks for count in lost), "the case has not come"
    stats = rig.engine.stats()
    assert stats["num_swapped_tokens"] == 2 * host_blocks * len(lost)
    if kind == "off":
        assert stats["num_recomputed_tokens"] == sum(lost) - stats["num_swapped_tokens"]


# 3. Read ahead.


@pytest.mark.parametrize("kind", ["hash", "radix"])
def test_the_disk_is_read_while_a_request_waits(kind: str) -> None:
    """One row; a request waits behind another. When its turn comes its blocks are on the host."""
    disk = Disk(100)
    flags: dict[str, Any] = {"offload": "prefix", "prefix_cache": kind, "block_size": 2}
    flags |= {"num_blocks": 30, "max_num_seqs": 1}
    first = Rig(40, disk, **flags)
    first.add("a", prompt(0, 20), 2)
    first.finish()
    rig = Rig(40, disk, **flags)
    rig.meaning = dict(first.meaning)
    loads, carry_out = [], rig.copies.carry_out

    def noted(copy: Any, event: Any) -> int:
        if copy.device_blocks and copy.kind == "load":
            loads.append([key for key in copy.disk_keys if key is not None])
        return carry_out(copy, event)

    rig.copies.carry_out = noted
    rig.add("before", prompt(1, 6), 12)
    for _ in range(3):
        rig.step()
    rig.add("a", prompt(0, 20), 2)
    for _ in range(4):
        rig.step()
        rig.runner.advance()
        rig.copies.do(rig.copies.orders)
    assert "before" not in rig.reasons and not loads
    host = rig.connector.host
    assert len(set(first.meaning) & set(host.of_key)) >= 9, "it waits, and so does the disk"
    rig.finish()
    assert rig.cached == {"before": 0, "a": 18}
    assert loads == [[]], "a load that waits for the disk"


def test_what_is_read_ahead_in_vain_is_given_back() -> None:
    disk = Disk(100)
    flags: dict[str, Any] = {"offload": "prefix", "block_size": 2, "num_blocks": 30}
    first = Rig(40, disk, **flags)
    first.add("a", prompt(0, 20), 2)
    first.finish()
    for num_steps in range(5):
        rig = Rig(40, disk, max_num_seqs=1, **flags)
        rig.meaning = first.meaning  # the disk goes from one to the next
        rig.add("before", prompt(1, 6), 8)
        rig.step()
        rig.add("a", prompt(0, 20), 2)
        assert rig.connector.is_busy, "nothing was begun"
        for _ in range(num_steps):
            rig.step()
        rig.engine.abort("a")
        rig.finish()  # which looks for lost blocks, on the device and on the host
