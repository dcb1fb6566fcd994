"""Part 12's host tier against a model: a device, copies and a disk that are played by hand.

The engine, the scheduler, the caches and the host tier are real, and so is what carries out a copy;
see `common/testing/played_device.py` for what is not.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.kv_store import Copy, HostBlocks
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import module_of
from common.testing.played_device import Copies, Disk, Kv, contents, expected_output
from common.testing.played_engine import Rig

PART = 12


def family(kind: int, length: int) -> list[int]:
    """Prompts that begin alike: in all, in the first 6 tokens, or not at all."""
    own = [(7 * i + 3 * kind) % 90 + 2 for i in range(length)]
    return [*range(2, 8), *own][:length] if kind < 2 else own


class Tier(RuleBasedStateMachine):
    """Requests come and go; device, copies and disk go on by themselves, or do not; copies fail; the
    engine sleeps."""

    part = PART

    @initialize(
        offload=st.sampled_from(["swap", "prefix", "both", "both"]),
        prefix_cache=st.sampled_from(["hash", "radix", "off"]),
        block_size=st.sampled_from([1, 2, 4]),
        num_blocks=st.integers(5, 12),
        host_blocks=st.integers(1, 24),
        max_num_seqs=st.integers(1, 4),
        budget=st.sampled_from([4, 8, 64]),
        policy=st.sampled_from(["lru", "arc"]),
        disk=st.sampled_from([None, None, 2, 50]),
        in_flight=st.sampled_from([1, 2, 2]),
    )
    def begin(self, disk: int | None, in_flight: int, **choices: Any) -> None:
        keeps = choices["offload"] != "swap"
        if keeps and choices["prefix_cache"] == "off":
            choices["prefix_cache"] = "hash"
        flags = {
            "offload": choices["offload"],
            "prefix_cache": choices["prefix_cache"],
            "block_size": choices["block_size"],
            "num_blocks": choices["num_blocks"],
            "max_num_seqs": choices["max_num_seqs"],
            "max_num_batched_tokens": choices["budget"],
        }
        if keeps:
            flags["offload_policy"] = choices["policy"]
        self.disk = Disk(disk) if disk and keeps else None
        self.rig = Rig(choices["host_blocks"], self.disk, self.part, **flags)
        self.rig.engine.num_in_flight = in_flight
        self.num_requests = 0

    @rule(
        kind=st.integers(0, 3),
        length=st.integers(1, 30),
        max_tokens=st.integers(1, 20),
        salt=st.sampled_from([None, None, None, "a"]),
        stop_at=st.none() | st.integers(0, 10),
    )
    def add(
        self, kind: int, length: int, max_tokens: int, salt: str | None, stop_at: int | None
    ) -> None:
        rig, name = self.rig, f"r{self.num_requests}"
        room = rig.runner.max_model_len
        prompt = family(kind, min(length, room - 1))
        max_tokens = min(max_tokens, room - len(prompt))
        self.num_requests += 1
        stop: tuple[int, ...] = ()
        if stop_at is not None:
            params = SamplingParams(max_tokens=max_tokens)
            output = expected_output(Request(name, prompt, params, cache_salt=salt))
            stop = tuple(output[stop_at : stop_at + 1])
        rig.add(name, prompt, max_tokens, salt=salt, stop=stop)

    @precondition(lambda self: self.rig.engine.sequences)
    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        self.rig.engine.abort(data.draw(st.sampled_from(sorted(self.rig.engine.sequences))))

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            if self.rig.engine.has_unfinished():
                self.rig.step()
                self.rig.engine.check_integrity()

    @precondition(lambda self: self.rig.runner.queued)
    @rule(count=st.integers(1, 3))
    def device(self, count: int) -> None:
        for _ in range(count):
            self.rig.runner.advance()

    @precondition(lambda self: not self.rig.copies.orders.empty())
    @rule(count=st.integers(1, 4))
    def copy(self, count: int) -> None:
        for _ in range(count):
            self.rig.copies.do(self.rig.copies.orders)

    @precondition(lambda self: not self.rig.copies.stores.empty())
    @rule()
    def store(self) -> None:
        self.rig.copies.do(self.rig.copies.stores)

    @precondition(lambda self: self.disk is not None and self.disk.blocks)
    @rule(data=st.data(), is_lost=st.booleans())
    def spoil(self, data: Any, is_lost: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.disk.blocks)))
        self.disk.bad.add(key)
        if is_lost:
            del self.disk.blocks[key]

    @rule(seconds=st.sampled_from([1e-6, 1e-6, 1e6]))
    def copies_take(self, seconds: float) -> None:
        self.rig.copies.block_seconds = seconds

    @rule(num_pieces=st.integers(0, 2))
    def next_copy_fails(self, num_pieces: int) -> None:
        self.rig.copies.fails_after = num_pieces

    @rule()
    def sleep(self) -> None:
        self.rig.sleep()

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "num_requests"):
            self.rig.engine.check_integrity()
            self.rig.check_host()

    def teardown(self) -> None:
        if hasattr(self, "num_requests"):
            self.rig.finish()


Tier.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTier = Tier.TestCase


class LaterTier(Tier):
    """The tier as a connector among others."""

    part = 13


LaterTier.TestCase.settings = settings(max_examples=15, stateful_step_count=30, deadline=None)
TestLaterTier = LaterTier.TestCase


# Found by the machine, or too rare for it.


@pytest.mark.parametrize("kind", ["hash", "radix"])
def test_what_a_copy_holds_is_not_counted_as_free(kind: str) -> None:
    """A sequence goes on, publishes more, and ends while its first block is being saved."""
    pool = module_of(PART, "kv_cache").BlockPool(4)
    cache = module_of(PART, "prefix_cache").make_block_cache(kind, pool, 4)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    request = Request("a", list(range(2, 14)), params)
    sequence = module_of(PART, "sequence").Sequence(request, 0, frozenset(), 64)
    cache.take(sequence, cache.match(sequence))
    sequence.block_table = cache.allocate(3)
    cache.publish(sequence, 4)
    hold = cache.hold(sequence, sequence.block_table[:1])
    cache.publish(sequence, 12)
    cache.release(sequence)
    assert cache.num_free == 3
    taken = cache.allocate(3)
    assert not set(taken) & set(hold.blocks)
    cache.let_go(hold)
    assert cache.num_free == 1
    cache.check_integrity([taken])


def prepared(num_host_blocks: int = 4, disk: Disk | None = None) -> Copies:
    """Copies over a device whose block n is full of n + 1."""
    kv = Kv(PART, 6, 2)
    kv.numbers[:] = np.arange(1, 7)[:, None]
    return Copies(num_host_blocks, disk, kv)


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_a_load_behind_a_failed_save_brings_nothing_of_it(failing: int) -> None:
    """Both were ordered before either was carried out."""
    copies = prepared()
    device = copies.pairs[0][0].numpy().view(np.int64)
    copies.start_load_kv(
        [Copy(1, "save", [0, 2, 4], [3, 1, 0]), Copy(2, "load", [1, 3, 5], [3, 1, 0])]
    )
    copies.fails_after = failing
    while copies.do(copies.orders):
        pass
    save, load = copies.get_finished()
    assert (save.num_blocks, save.is_whole) == (0, False)
    assert (load.num_blocks, load.is_whole) == (0, False)
    assert device[:, 0].tolist() == [1, 2, 3, 4, 5, 6], "nothing was brought"
    copies.start_load_kv([Copy(3, "save", [0, 2], [3, 1]), Copy(4, "load", [1, 3, 5], [3, 1, 0])])
    while copies.do(copies.orders):
        pass
    save, load = copies.get_finished()
    assert save.is_whole and (load.num_blocks, load.is_whole) == (2, False)
    assert device[:, 0].tolist() == [1, 1, 3, 3, 5, 6]


def test_a_rank_that_cannot_copy_says_so() -> None:
    """Rank 0 does not know what has become of other ranks' copies."""
    copies = prepared()
    copies.start_load_kv([Copy(1, "save", [0], [0]), Copy(2, "save", [1], [1])])
    copies.do(copies.orders)
    copies.wait_until(1)
    copies.fails_after = 0
    copies.do(copies.orders)
    with pytest.raises(RuntimeError, match="has failed"):
        copies.wait_until(2)


def test_what_was_read_from_disk_may_lie_where_a_save_has_failed() -> None:
    disk = Disk(4)
    copies = prepared(disk=disk)
    disk.write(b"k", [np.full(2, 77, np.int64).view(np.uint8)])
    copies.start_load_kv([Copy(1, "save", [0], [2]), Copy(2, "load", [4], [2], [b"k"])])
    copies.fails_after = 0
    while copies.do(copies.orders):
        pass
    assert [copied.is_whole for copied in copies.get_finished()] == [False, True]
    assert copies.pairs[0][0].numpy().view(np.int64)[4].tolist() == [77, 77]


def test_the_machine_would_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own negative control: blocks that are let go before their copy is done."""
    rig = Rig(16, offload="swap", block_size=2, num_blocks=8, max_num_seqs=4)
    connector = rig.connector

    def hasty(kind: str, sequence: Any, blocks: list[int], *rest: Any, **more: Any) -> None:
        real.order(connector, kind, sequence, blocks, *rest, **more)
        number = connector.num_copies
        transfer = connector.transfers[number]
        connector.cache.let_go(transfer.hold)
        connector.transfers[number] = replace(transfer, hold=None)

    real = module_of(PART, "offload").Offload
    monkeypatch.setattr(connector, "order", hasty)
    for number in range(4):
        rig.add(f"r{number}", family(number, 4), 12)
    with pytest.raises(AssertionError, match="wrong keys and values"):
        for _ in range(60):
            rig.step()  # no copy is carried out but where all waits for one
            rig.runner.advance()
            rig.runner.advance()


@pytest.mark.parametrize("kind", ["hash", "radix", "off"])
@pytest.mark.parametrize("in_flight", [1, 2])
def test_a_burst_loses_nothing(kind: str, in_flight: int) -> None:
    """Four times what the device has room for: all is swapped, no token is computed twice."""
    rig = Rig(64, offload="swap", prefix_cache=kind, block_size=2, num_blocks=8, max_num_seqs=4)
    rig.engine.num_in_flight = in_flight
    for number in range(8):
        rig.add(f"r{number}", [(7 * i + 11 * number) % 90 + 2 for i in range(4)], 12)
    rig.finish()
    stats = rig.engine.stats()
    assert stats["num_preemptions"] > 3 and stats["num_swapped_tokens"] > 20
    assert stats["num_recomputed_tokens"] == 0


@pytest.mark.parametrize("kind", ["hash", "radix"])
def test_blocks_outlive_the_engine_on_disk(kind: str) -> None:
    """The next engine has another host and the same disk. What is spoiled there is computed."""
    disk = Disk(100)
    flags = {"offload": "prefix", "prefix_cache": kind, "block_size": 2, "num_blocks": 20}
    first = Rig(30, disk, **flags)
    first.add("a", family(2, 20), 4)
    first.finish()
    assert len(disk.blocks) == 11
    second = Rig(30, disk, **flags)
    second.meaning = first.meaning
    second.add("a", family(2, 20), 4)
    second.add("salted", family(2, 20), 4, salt="s")
    second.finish()
    assert second.cached == {"a": 18, "salted": 0}
    third = Rig(30, disk, **flags)
    third.meaning = second.meaning
    whole = third.meaning
    tokens = contents(family(2, 20), None)
    [key] = [key for key, numbers in whole.items() if list(numbers) == tokens[8:10]]
    disk.bad.add(key)
    third.add("a", family(2, 20), 4)
    third.finish()
    assert third.cached == {"a": 8}


@pytest.mark.parametrize("policy", ["lru", "arc"])
def test_blocks_in_use_keep_their_keys(policy: str) -> None:
    host = HostBlocks(2, policy)
    blocks = host.allocate(2)
    host.publish([b"a", b"b"], blocks)  # still owned by the copy that brings them
    assert host.allocate(1) is None and list(host.of_key) == [b"a", b"b"]
    host.free(blocks[1:])
    assert host.allocate(2) is None, "one can go, and one cannot"
    host.free(blocks[:1])
    host.forget([b"a"], blocks[:1])
    assert b"a" not in host and host.allocate(1) == blocks[:1]
    host.forget([b"a"], blocks[:1])  # it has another meaning by now
    host.check_integrity([blocks[:1]])
