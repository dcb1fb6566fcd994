"""Part 07's own invariants: what may be found in a prefix cache, and what must never be."""

import copy
from array import array
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.requests import Request
from common.sampling import SamplingParams
from common.testing.oracle import check_greedy, check_seeded
from common.testing.parts import PARTS, engine_of, module_of, wrap_model
from common.testing.schedules import Drive, Event

MODEL = "random:tiny-llama"
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PROMPT = [(7 * i) % 500 + 2 for i in range(30)]
KINDS = ["hash", "radix"]

cache_module = module_of(7, "prefix_cache")
BlockPool = module_of(7, "kv_cache").BlockPool


def sequence_of(name: str, tokens: list[int], salt: str | None = None, part: int = 7) -> Any:
    request = Request(name, tokens, GREEDY, cache_salt=salt)
    return module_of(part, "sequence").Sequence(request, 0, frozenset(), 1024)


def take(cache: Any, sequence: Any) -> None:
    """Let a sequence begin with what is found for it."""
    found = cache.match(sequence)
    cache.take(sequence, found)
    sequence.block_table = found.blocks


def engine_with(kind: str = "hash", **flags: Any) -> Any:
    """An engine with an empty cache."""
    flags = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8} | flags
    engine = engine_of(7, MODEL, threads=1, prefix_cache=kind, **flags)
    assert not engine.has_unfinished()
    scheduler = engine.scheduler
    taken = scheduler.cache.allocate(scheduler.cache.num_free)  # which forgets all
    scheduler.cache.pool.free(taken)
    return engine


def run(engine: Any, *prompts: list[int], **arguments: Any) -> list[Any]:
    params = arguments.pop("params", GREEDY)
    completions = engine.generate(list(prompts), params, progress=False, **arguments)
    engine.check_integrity()
    assert engine.stats()["num_used_blocks"] == 0
    return completions


def finish(engine: Any) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished():
        for output in engine.step():
            tokens[output.request_id] = tokens.get(output.request_id, []) + output.token_ids
        engine.check_integrity()
    return tokens


# What is found.


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", range(1, 14))
def test_full_blocks_are_found_but_never_all_tokens(kind: str, length: int) -> None:
    engine = engine_with(kind)
    first, second = (run(engine, PROMPT[:length])[0] for _ in range(2))
    assert first.num_cached_tokens == 0
    assert second.num_cached_tokens == (length - 1) // 4 * 4
    assert first.token_ids == second.token_ids
    assert check_greedy(MODEL, [(PROMPT[:length], second.token_ids)]).is_right


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_generated_is_found_too(kind: str) -> None:
    """The next turn of a conversation begins with the last answer."""
    engine = engine_with(kind)
    [answer] = run(engine, PROMPT[:10])  # 18 tokens; the last was drawn and never computed
    [longer] = run(engine, PROMPT[:10] + answer.token_ids + [3] * 6)
    assert longer.num_cached_tokens == 16
    other = PROMPT[:10] + answer.token_ids[:3] + [3] * 9
    assert run(engine, other)[0].num_cached_tokens == 12


@pytest.mark.parametrize("kind", KINDS)
def test_a_different_beginning_finds_nothing(kind: str) -> None:
    """The same tokens elsewhere have other keys and values."""
    engine = engine_with(kind)
    run(engine, PROMPT)
    assert run(engine, [9, *PROMPT])[0].num_cached_tokens == 0
    assert run(engine, [9, *PROMPT[1:]])[0].num_cached_tokens == 0
    assert run(engine, PROMPT[4:])[0].num_cached_tokens == 0
    assert run(engine, [*PROMPT[:8], 9, *PROMPT[9:]])[0].num_cached_tokens == 8


def test_off_finds_nothing() -> None:
    engine = engine_with("off")
    assert [run(engine, PROMPT)[0].num_cached_tokens for _ in range(3)] == [0, 0, 0]
    assert engine.stats()["num_prefix_cache_hits"] == 0


@pytest.mark.parametrize("kind", KINDS)
def test_salts_are_walls(kind: str) -> None:
    """Two tenants never share a block, and neither does one with those who have no salt."""
    engine = engine_with(kind)
    salts = ["alice", "bob", None, "alic", "\ud800", "alice\0"]
    for salt in salts:
        assert run(engine, PROMPT, cache_salt=salt)[0].num_cached_tokens == 0, salt
    for salt in salts:
        assert run(engine, PROMPT, cache_salt=salt)[0].num_cached_tokens == 28, salt
    tables = []
    for salt in salts:
        engine.add_request(Request(f"salt {salt!r}", PROMPT, GREEDY, cache_salt=salt))
    engine.step()
    tables = [set(sequence.block_table) for sequence in engine.sequences.values()]
    assert sum(map(len, tables)) == len(set.union(*tables)), "a block with two tenants"
    finish(engine)


def test_a_salt_that_looks_like_a_block_opens_nothing() -> None:
    """The first block's key must not be had by a salt that spells another block's key."""
    cache = cache_module.HashPrefixCache(BlockPool(8), 4)
    victim = sequence_of("v", PROMPT[:8])
    first = cache.keys(victim, 8)[0]
    for salt in (first.decode("latin-1"), first.hex(), ""):
        thief = sequence_of("t", PROMPT[4:8], salt)
        assert not set(cache.keys(thief, 4)) & set(cache.keys(victim, 8))


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 7])
def test_no_salt_has_the_key_of_a_block(part: int) -> None:
    """Hashed once, a salt made of what a block's key is made of would be that block's key; then
    whoever sends the second block as a prompt has written what the victim reads as its second."""
    module = module_of(part, "prefix_cache")
    cache = module.HashPrefixCache(module_of(part, "kv_cache").BlockPool(8), 4)
    victim = sequence_of("v", PROMPT[:8])
    salt = bytes(32) + array("i", PROMPT[:4]).tobytes()
    thief = sequence_of("t", PROMPT[4:8], salt.decode())
    assert cache.keys(thief, 4) != cache.keys(victim, 8)[1:]


def test_blocks_of_who_leaves_are_waited_for() -> None:
    """Five blocks: a has two of them and its last token on its way when b and c need their second.
    One is there for b; c waits a step for a's, and is not preempted."""
    engine = engine_with(num_blocks=5, block_size=4, max_num_seqs=3)
    engine.add_request(Request("a", PROMPT[:3], replace(GREEDY, max_tokens=3)))
    engine.add_request(Request("b", PROMPT[10:12], replace(GREEDY, max_tokens=5)))
    engine.add_request(Request("c", PROMPT[20:22], replace(GREEDY, max_tokens=5)))
    before = engine.stats()["num_preemptions"]
    waited = []
    while engine.has_unfinished():
        engine.step()
        engine.check_integrity()
        waited.append(list(engine.trace.last_record.scheduled))
    assert waited[:5] == [["a", "b", "c"]] * 3 + [["b"], ["b", "c"]]
    assert engine.stats()["num_preemptions"] == before


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_penalties_do_not_notice(kind: str) -> None:
    params = SamplingParams(
        seed=5, temperature=0.9, presence_penalty=1.0, frequency_penalty=0.5, max_tokens=12
    )
    params = replace(params, ignore_eos=True)
    engine = engine_with(kind)
    first, second = (run(engine, PROMPT, params=params)[0] for _ in range(2))
    assert second.num_cached_tokens == 28 and first.token_ids == second.token_ids
    assert check_seeded(MODEL, [(PROMPT, second.token_ids, params)]).is_right


@pytest.mark.parametrize("kind", KINDS)
def test_completions_of_one_prompt_share_its_blocks(kind: str) -> None:
    """Those that join later: eight choices of 28 tokens and a budget of 32."""
    engine = engine_with(kind, max_num_batched_tokens=32)
    completions = run(engine, PROMPT[:28], params=replace(GREEDY, n=8))
    assert len({tuple(c.token_ids) for c in completions}) == 1
    assert completions[0].num_cached_tokens == 0
    assert sum(c.num_cached_tokens for c in completions) >= 5 * 24


# When it is found.


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_shared_when_it_is_read_and_not_before(kind: str) -> None:
    engine = engine_with(kind, max_num_batched_tokens=8)
    engine.add_request(Request("a", PROMPT, GREEDY))
    engine.step()
    assert engine.sequences["a"].num_computed_tokens == 8
    assert engine.sequences["a"].num_published_blocks == 0, "launched and not read"
    engine.step()
    assert engine.sequences["a"].num_computed_tokens == 16
    assert engine.sequences["a"].num_published_blocks == 2
    finish(engine)


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_failed_step_left_is_never_found(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = engine_with(kind, max_num_batched_tokens=8)
    calls: list[int] = []

    def fail(token_ids: list[int], num_rows: int, real: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("the model failed")
        return real()

    with monkeypatch.context() as patch:
        wrap_model(engine, patch, fail)
        engine.add_request(Request("a", PROMPT, GREEDY))
        with pytest.raises(RuntimeError):
            for _ in range(4):
                engine.step()
        engine.fail_step()
        finish(engine)
    [again] = run(engine, PROMPT)
    assert again.num_cached_tokens == 8, "what the first step computed, and no more"
    assert check_greedy(MODEL, [(PROMPT, again.token_ids)]).is_right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("is_async", [False, True])
def test_a_preempted_sequence_finds_itself(
    kind: str, is_async: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_with(kind)
    monkeypatch.setattr(engine, "num_in_flight", 2 if is_async else 1)
    engine.add_request(Request("a", PROMPT, replace(GREEDY, max_tokens=20)))
    tokens = [token for _ in range(8) for output in engine.step() for token in output.token_ids]
    sequence = engine.sequences["a"]
    engine.scheduler.preempt(sequence)
    engine.check_integrity()
    for _ in range(3):
        tokens += [token for output in engine.step() for token in output.token_ids]
    assert sequence.row is not None
    assert sequence.num_cached_tokens == 0, "usage tells what its first start found"
    record = [r for r in engine.trace.records() if r.preempted][-1:] or engine.trace.records()[-4:]
    assert all(sum(r.scheduled.values()) < 20 for r in record), "it was computed again"
    tokens += finish(engine)["a"]
    assert len(tokens) == 20 and check_greedy(MODEL, [(PROMPT, tokens)]).is_right


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_of_one_token_leaves_its_prompt(kind: str) -> None:
    """It gives up its row when its only step is launched, and its blocks when that is read."""
    engine = engine_with(kind)
    for expected in (0, 28):
        [c] = run(engine, PROMPT, params=replace(GREEDY, max_tokens=1))
        assert c.num_cached_tokens == expected


# What is forgotten.


@pytest.mark.parametrize("kind", KINDS)
def test_the_beginning_outlives_the_end(kind: str) -> None:
    """12 blocks: a chain of 8 is in them, and others take some: its last blocks are lost first."""
    engine = engine_with(kind, num_blocks=12)
    run(engine, PROMPT[:30], params=replace(GREEDY, max_tokens=3))
    run(engine, [5] * 22, params=replace(GREEDY, max_tokens=1))
    [c] = run(engine, PROMPT[:30], params=replace(GREEDY, max_tokens=1))
    assert 0 < c.num_cached_tokens < 28


@pytest.mark.parametrize("kind", KINDS)
def test_who_was_used_last_stays(kind: str) -> None:
    engine = engine_with(kind, num_blocks=16)
    one = replace(GREEDY, max_tokens=1)
    prompts = [[token] * 17 for token in (5, 6, 7)]  # 5 blocks each, 4 of them to be shared
    for prompt in prompts:
        run(engine, prompt, params=one)
    run(engine, prompts[0], params=one)  # so that the second was not used for longest
    run(engine, [8] * 17, params=one)
    found = [run(engine, p, params=one)[0].num_cached_tokens for p in (prompts[0], prompts[2])]
    assert found == [16, 16]
    assert run(engine, prompts[1], params=one)[0].num_cached_tokens < 16


@pytest.mark.parametrize("kind", KINDS)
def test_who_ended_last_was_used_last(kind: str) -> None:
    """Of two that ran side by side the one that went on for longer stays, though it began first."""
    engine = engine_with(kind, num_blocks=24)
    engine.add_request(Request("long", [5] * 16, replace(GREEDY, max_tokens=20)))
    engine.step()
    engine.step()
    engine.add_request(Request("short", [6] * 16, replace(GREEDY, max_tokens=1)))
    finish(engine)
    run(engine, [7] * 60, params=replace(GREEDY, max_tokens=1))  # takes 15 or 16 of 24 blocks
    one = replace(GREEDY, max_tokens=1)
    assert run(engine, [5] * 17, params=one)[0].num_cached_tokens == 16
    assert run(engine, [6] * 17, params=one)[0].num_cached_tokens == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_is_there_already_is_not_held_twice(kind: str) -> None:
    """The same request again: its own copy of the answer goes when it ends, and until then what the
    cache has of it may be given to others."""
    engine = engine_with(kind, num_blocks=24)
    params = replace(GREEDY, max_tokens=56)
    for _ in range(3):
        before = engine.stats()["num_preemptions"]
        run(engine, PROMPT, params=params)  # 22 blocks
        assert engine.stats()["num_preemptions"] == before


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_begin_alike_and_part(kind: str) -> None:
    """Each goes on behind the blocks that they share, and both ways can be found."""
    cache = cache_module.make_block_cache(kind, BlockPool(16), 2)

    def begin(name: str, tokens: list[int]) -> Any:
        sequence = sequence_of(name, tokens)
        take(cache, sequence)
        missing = (len(tokens) + 1) // 2 - len(sequence.block_table)
        sequence.block_table += cache.allocate(missing)
        cache.publish(sequence, len(tokens))
        return sequence

    first, second = (begin(name, [1, 2, 3, 4, 5]) for name in "ab")
    assert first.block_table[:2] == second.block_table[:2]
    for sequence, tokens in ((first, [6, 7, 8]), (second, [9, 7, 8])):
        sequence.extend(tokens)
        sequence.block_table += cache.allocate(1)
        cache.publish(sequence, 8)
        cache.check_integrity([first.block_table, second.block_table])
    for sequence, token in ((first, 6), (second, 9)):
        third = begin("c", [1, 2, 3, 4, 5, token, 7, 8, 0])
        assert third.block_table[:4] == sequence.block_table
        cache.release(third)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_of_the_cache_is_bounded(kind: str) -> None:
    """Ten thousand prompts, each with its salt: no structure grows beyond what the pool holds."""
    cache = cache_module.make_block_cache(kind, BlockPool(8), 2)
    for i in range(10_000):
        sequence = sequence_of(f"s{i}", [i, i + 1, i % 7, 1, 2], f"{i % 97}")
        take(cache, sequence)
        sequence.block_table += cache.allocate(3 - len(sequence.block_table))
        cache.publish(sequence, 5)
        cache.release(sequence)
    cache.check_integrity([])
    if kind == "hash":
        assert len(cache.blocks) <= 8
    else:
        assert cache.num_nodes <= 8 and not cache.ends and len(cache.leaves) <= 2 * 8 + 65


def test_hits_are_counted() -> None:
    engine = engine_with("hash")
    before = engine.stats()
    run(engine, PROMPT)
    run(engine, PROMPT)
    after = engine.stats()
    assert after["num_prefix_cache_queries"] - before["num_prefix_cache_queries"] == 60
    assert after["num_prefix_cache_hits"] - before["num_prefix_cache_hits"] == 28


class Poisoner(Drive):
    """After each step, writes large numbers where nothing lies that anybody may find."""

    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.engine.has_unfinished():
                break
            super().steps(1)
            cache, pool = self.engine.scheduler.cache, self.engine.kv.pool
            held = getattr(cache, "key_of", {})
            free = [block for block in pool.free_blocks if block not in held]
            self.engine.kv.data[free] = 1e4
            self.num_poisoned = getattr(self, "num_poisoned", 0) + len(free)


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 7])
@pytest.mark.parametrize("kind", KINDS)
def test_what_others_left_behind_is_never_read(kind: str, part: int) -> None:
    for pool in ({"num_blocks": 17, "max_num_seqs": 8}, {"num_blocks": 40, "max_num_seqs": 3}):
        flags = {"block_size": 4, "max_num_batched_tokens": 20, "prefix_cache": kind} | pool
        engine = engine_of(part, MODEL, threads=1, **flags)
        drive = Poisoner(engine, MODEL)
        abort = {5: 3, 9: 9, 11: 6}
        stop = {4: 2, 7: 5}
        drive.run([Event(i % 12, 24, stop.get(i), abort.get(i), i % 5) for i in range(16)])
        assert drive.num_poisoned > 30


# To look for something is not to take it.


def eviction_order(cache: Any) -> list[int]:
    """The blocks that can be had, in the order in which they are given away: that of a copy."""
    cache = copy.deepcopy(cache)
    return [block for _ in range(cache.num_free) for block in cache.allocate(1)]


def state_of(cache: Any) -> tuple[Any, ...]:
    """Owners and order of all blocks. A tree may be cut into other nodes, with the same in them."""
    last_used: dict[int, tuple[int, int]] = {}
    nodes = [cache.root] if hasattr(cache, "root") else []
    for node in nodes:  # which grows
        nodes += node.children.values()
        last_used |= dict.fromkeys(node.blocks, (node.last_used, node.num_locks))
    return (
        list(cache.pool.ref_counts),
        list(cache.pool.free_blocks),
        cache.num_free,
        last_used,
        eviction_order(cache),
    )


@pytest.mark.parametrize("part", [part for part in PARTS if part >= 7])
@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_refused_leaves_everything_as_it_was(kind: str, part: int) -> None:
    """It finds 20 tokens of one chain, and too few blocks are left for the rest: it waits, step
    after step, and what it found is still what was not used for longest."""
    flags: dict[str, Any] = {"num_blocks": 24, "block_size": 4, "max_num_seqs": 8}
    engine = engine_of(part, MODEL, threads=1, prefix_cache=kind, **flags)
    scheduler = engine.scheduler
    cache = scheduler.cache
    cache.pool.free(cache.allocate(cache.num_free))  # which forgets all
    one = replace(GREEDY, max_tokens=1)
    for prompt in (PROMPT, [5] * 13, [*PROMPT[:12], 3, 3, 3, 3, 3]):
        engine.generate([prompt], one, progress=False)
    engine.add_request(Request("long", [9] * 31, replace(GREEDY, max_tokens=10)))
    for _ in range(3):
        engine.step()
    head = Request("head", [*PROMPT[:22], *[8] * 50], GREEDY)
    engine.add_request(head)
    before = state_of(cache)
    assert len(before[-1]) < 19 and before[2] == len(before[-1])
    for _ in range(3):
        output = module_of(part, "scheduler").SchedulerOutput()
        scheduler.admit(output)
        assert not output.num_new_tokens and not output.admitted and not output.new_blocks
        assert state_of(cache) == before
        engine.check_integrity()
    sequence = engine.sequences["head"]
    assert sequence.block_table == [] and sequence.num_cached_tokens is None
    assert sequence.num_computed_tokens == 0 and sequence.row is None
    finish(engine)
    assert sequence.num_cached_tokens == 20, "it is found once there is room"
    assert check_greedy(MODEL, [(head.prompt_token_ids, sequence.output_token_ids)]).is_right


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_looked_at_and_not_taken_can_be_evicted_to_the_last_block(kind: str) -> None:
    """Looking cuts nodes of the tree in two; all of them stay known to who evicts."""
    cache = cache_module.make_block_cache(kind, BlockPool(16), 2)
    for name, tokens in {"a": [1] * 12, "b": [1, 1, 1, 1, 2, 2, 2, 2], "c": [3] * 8}.items():
        sequence = sequence_of(name, tokens)
        take(cache, sequence)
        missing = len(tokens) // 2 - len(sequence.block_table)
        sequence.block_table += cache.allocate(missing)
        cache.publish(sequence, len(tokens))
        cache.release(sequence)
    before = state_of(cache)
    looks = [[1, 1, 9], [1] * 7, [3, 3, 3], [3] * 7, [1, 1, 1, 1, 2, 2, 9], [1] * 11, [7, 7, 7]]
    found = [len(cache.match(sequence_of("look", tokens)).blocks) for tokens in looks * 2]
    assert found == [1, 3, 1, 3, 3, 5, 0] * 2
    assert state_of(cache) == before
    cache.check_integrity([])
    given = [block for _ in range(16) for block in cache.allocate(1)]
    assert given == before[-1] and sorted(given) == list(range(16))
    assert cache.num_free == 0
    assert not cache.match(sequence_of("look", [1] * 11)).blocks, "all of it is forgotten"
    cache.pool.free(given)
    cache.check_integrity([])


# Against a brute-force model of what may be found.


class CacheMachine(RuleBasedStateMachine):
    """Sequences come, compute, grow and go. The model knows what each block holds, in full, and
    which beginnings can be found: those that were published and whose block was not given away."""

    kind = ""

    @initialize(num_blocks=st.integers(4, 24), block_size=st.integers(1, 3))
    def start(self, num_blocks: int, block_size: int) -> None:
        self.pool, self.block_size = BlockPool(num_blocks), block_size
        self.cache = cache_module.make_block_cache(self.kind, self.pool, block_size)
        self.sequences: list[Any] = []
        self.computed: dict[Any, int] = {}
        self.holds: dict[int, Any] = {}  # block -> (salt, all tokens up to its end)
        # (salt, tokens up to a block's end) -> blocks that hold it and are published. The table finds
        # the first; the tree one of them, so it may lose what it has while another sequence has it.
        self.found_in: dict[Any, list[int]] = {}
        self.shaky: set[Any] = set()  # of which a block was given away
        self.count = 0

    def beginning(self, sequence: Any, num_blocks: int) -> Any:
        tokens = sequence.prompt_token_ids + sequence.output_token_ids
        return sequence.request.cache_salt, tuple(tokens[: num_blocks * self.block_size])

    def allocate(self, count: int) -> list[int]:
        before = self.cache.num_free
        blocks = self.cache.allocate(count)
        assert len(set(blocks)) == count and self.cache.num_free == before - count
        for key, holders in list(self.found_in.items()):
            if not set(holders) & set(blocks):
                continue
            self.found_in[key] = [block for block in holders if block not in blocks]
            self.shaky.add(key)
            if not self.found_in[key]:
                del self.found_in[key]
                self.shaky.discard(key)
        for block in blocks:
            assert not any(block in other.block_table for other in self.sequences)
            self.holds.pop(block, None)
        return blocks

    @rule(
        tokens=st.lists(st.integers(0, 1), min_size=1, max_size=12),
        salt=st.sampled_from([None, None, "a", "b"]),
    )
    def begin(self, tokens: list[int], salt: str | None) -> None:
        sequence = sequence_of(f"s{self.count}", tokens, salt)
        self.count += 1
        before = state_of(self.cache)
        match = self.cache.match(sequence)
        assert state_of(self.cache) == before, "to look for something changes nothing"
        self.cache.check_integrity([other.block_table for other in self.sequences])
        found = match.blocks
        most = best = 0
        while (most + 1) * self.block_size < len(tokens):
            if self.beginning(sequence, most + 1) not in self.found_in:
                break
            most += 1
            if best == most - 1 and self.beginning(sequence, most) not in self.shaky:
                best = most
        assert best <= len(found) <= most, f"{len(found)} blocks found, {best} to {most} are there"
        assert self.kind != "hash" or best == most
        for place, block in enumerate(found):
            assert self.holds[block] == self.beginning(sequence, place + 1)
        num_used = sum(self.pool.ref_counts[block] > 0 for block in found)
        assert self.kind != "hash" or match.num_free == len(found) - num_used
        missing = -(-len(tokens) // self.block_size) - len(found)
        if missing > self.cache.num_free - match.num_free:
            return  # refused; nothing was taken
        num_free = self.cache.num_free
        self.cache.take(sequence, match)
        assert self.cache.num_free == num_free - match.num_free
        sequence.block_table = found
        sequence.block_table += self.allocate(missing)
        self.sequences.append(sequence)
        self.computed[sequence] = len(found) * self.block_size

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99), count=st.integers(1, 9))
    def compute(self, which: int, count: int) -> None:
        """Some more of what is known, read and published."""
        sequence = self.sequences[which % len(self.sequences)]
        end = min(self.computed[sequence] + count, sequence.num_tokens)
        self.computed[sequence] = end
        for place in range(end // self.block_size):
            key = self.beginning(sequence, place + 1)
            block = sequence.block_table[place]
            assert self.holds.setdefault(block, key) == key, "a shared block was written to"
            holders = self.found_in.setdefault(key, [block])
            if self.kind == "radix" and block not in holders:
                holders.append(block)
        self.cache.publish(sequence, end)

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99), token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        sequence = self.sequences[which % len(self.sequences)]
        missing = -(-(sequence.num_tokens + 1) // self.block_size)
        missing -= len(sequence.block_table)
        if missing <= self.cache.num_free:
            sequence.block_table += self.allocate(missing)
            sequence.extend([token])

    @precondition(lambda self: self.sequences)
    @rule(which=st.integers(0, 99))
    def end(self, which: int) -> None:
        """It finishes, is aborted or preempted."""
        sequence = self.sequences.pop(which % len(self.sequences))
        self.cache.release(sequence)
        del self.computed[sequence]

    @invariant()
    def is_whole(self) -> None:
        if hasattr(self, "cache"):
            self.cache.check_integrity([sequence.block_table for sequence in self.sequences])
            used = {block for sequence in self.sequences for block in sequence.block_table}
            assert self.cache.num_free <= self.pool.num_blocks - len(used)
            if not self.sequences:
                assert self.cache.num_free == self.pool.num_blocks


class HashMachine(CacheMachine):
    kind = "hash"


class RadixMachine(CacheMachine):
    kind = "radix"


LIMITS = settings(
    max_examples=60,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestHash, TestRadix = HashMachine.TestCase, RadixMachine.TestCase
TestHash.settings = TestRadix.settings = LIMITS
