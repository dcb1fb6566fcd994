"""Part 12's host tier against a model: a device, copies and a disk that are played by hand.

The engine, the scheduler, the caches and the host tier are real. What they talk to is not: the
device, the threads that copy, and the disk do one thing at a time when they are told to, in any
order that the real ones could. A token's keys and values are one number, made of the salt and of all
tokens up to it. So each step can be told whether its sequences stand on what they should, and what a
request must give is known beforehand. Blocks are poisoned when they are given out anew.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.kv_store import BlockCopies, Copy, block_copies
from common.kv_store.block_copies import move
from common.requests import Request
from common.sampling import SamplingParams
from common.testing.parts import module_of

PART = 12
POISON = -1
VOCAB = 512


def mixed(before: int, token_id: int) -> int:
    """A number for a token and all before it."""
    return (before * 1_000_003 + token_id * 7919 + 12345) % (1 << 61)


def contents(tokens: list[int], salt: str | None) -> list[int]:
    """What the KV cache has for each token."""
    number, result = sum((salt or "").encode()) + 17, []
    for token_id in tokens:
        number = mixed(number, token_id)
        result.append(number)
    return result


def drawn_after(read: Iterable[int]) -> int:
    """The next token, from all that attention reads."""
    return sum(number >> 7 for number in read) % (VOCAB - 2) + 2


def expected_output(request: Request) -> list[int]:
    tokens, output = list(request.prompt_token_ids), []
    for _ in range(request.params.max_tokens):
        output.append(drawn_after(contents(tokens + output, request.cache_salt)))
        if output[-1] in request.params.stop_token_ids:
            break
    return output


class Disk:
    """A disk that loses and spoils blocks when it is told to."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.blocks: dict[bytes, np.ndarray] = {}
        self.bad: set[bytes] = set()

    def __contains__(self, key: bytes) -> bool:
        return key in self.blocks

    def write(self, key: bytes, pieces: list[np.ndarray]) -> None:
        while len(self.blocks) >= self.capacity and key not in self.blocks:
            self.bad.discard(oldest := next(iter(self.blocks)))
            del self.blocks[oldest]
        self.blocks.setdefault(key, pieces[0].copy())

    def read(self, key: bytes, into: list[np.ndarray]) -> bool:
        if key not in self.blocks or key in self.bad:
            self.blocks.pop(key, None)
            self.bad.discard(key)
            into[0][:] = 255
            return False
        into[0][:] = self.blocks[key]
        return True

    def stats(self) -> dict[str, int]:
        return {}

    def close(self) -> None: ...


class Copies(BlockCopies):
    """The real ones, without their threads: orders are carried out by `do` alone, the oldest first,
    and those for the disk in a queue of their own."""

    def __init__(self, num_host_blocks: int, disk: Disk | None, kv: Any) -> None:
        super().__init__(num_host_blocks, disk)
        self.register_kv_caches([kv.data])
        self.numbers = self.host[0].view(np.int64) if num_host_blocks else np.zeros((0, 1))
        self.block_seconds = 1e-6
        self.fails_after: int | None = None  # pieces of the next copy
        self.help: Callable[[], None] = lambda: None  # lets the device go on

    def run(self, orders: Any) -> None: ...

    def wait(self, seconds: float) -> None:
        self.help()
        if self.done.empty() and not self.do(self.orders):
            self.do(self.stores)

    def do(self, orders: Any) -> bool:
        """Whether there was an order."""
        if orders.empty():
            return False
        done = self.attempt(*orders.get())
        self.done.put(replace(done, seconds=done.num_blocks * self.block_seconds))
        return True

    def carry_out(self, copy: Copy, event: Any) -> int:
        left, self.fails_after = self.fails_after, None
        if left is None:
            return super().carry_out(copy, event)
        moves = iter(range(left))

        def failing(to: torch.Tensor, source: torch.Tensor) -> None:
            if next(moves, None) is None:
                raise RuntimeError("a copy fails")
            move(to, source)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(block_copies, "move", failing)
            return super().carry_out(copy, event)


@dataclass
class Row:
    """A sequence in a step: all that the device is told of it."""

    sequence: Any
    table: list[int]
    begin: int
    count: int
    is_sampled: bool


@dataclass
class Work:
    """A step on the device."""

    runner: "Runner"
    rows: list[Row]
    token_ids: list[list[int]] | None = None

    def wait(self) -> None:
        while self.token_ids is None:
            self.runner.advance()

    def result(self) -> Any:
        self.wait()
        logprobs = [[None] for _ in self.token_ids]
        return SimpleNamespace(prompts=[], lists=lambda: (self.token_ids, logprobs))

    def times(self) -> tuple[float, float]:
        return 0.0, self.runner.step_seconds


@dataclass
class Runner:
    """In the place of the runner: it keeps tables as the real one does, and a queue of work that
    the device does in order when it is told to."""

    config: Any
    kv: Any
    connector: Any
    queued: deque[Any] = field(default_factory=deque)
    step_seconds: float = 1.0

    def __post_init__(self) -> None:
        nothing = SimpleNamespace(close=lambda: None, close_soon=lambda: None, problem=lambda: None)
        nothing.group = SimpleNamespace(num_bytes_sent=0)
        self.ranks = self.queue = nothing
        self.model = SimpleNamespace(config=SimpleNamespace(vocab_size=VOCAB))
        self.max_model_len = self.kv.num_blocks * self.kv.block_size
        self.num_weight_bytes = self.num_buffer_bytes = 0
        self.rank_bytes: list[Any] = []
        width = self.kv.num_blocks
        self.tables = np.full((self.config.max_num_seqs, width), POISON, np.int64)
        self.known: dict[Any, list[int]] = {}  # of each sequence, the tokens that the device knows
        self.connector.help = self.advance

    def expert_stats(self) -> dict[str, Any]:
        return {}

    def transfer(self, copies: list[Copy]) -> None:
        if copies:
            self.queued.append(list(copies))

    def poison(self, blocks: list[int]) -> None:
        """What the device was given before may still use them."""
        self.queued.append(tuple(blocks))

    def prepare(self, scheduled: Any) -> list[Row]:
        for sequence in scheduled.admitted:
            self.tables[sequence.row] = POISON
            self.tables[sequence.row, : len(sequence.block_table)] = sequence.block_table
            self.known[sequence] = sequence.tokens(0, sequence.num_tokens)
        for sequence, blocks in scheduled.new_blocks.items():
            end = len(sequence.block_table)
            self.tables[sequence.row, end - len(blocks) : end] = blocks
        return [
            Row(s, self.tables[s.row].tolist(), s.num_computed_tokens, n, s in scheduled.sampled)
            for s, n in scheduled.num_new_tokens.items()
        ]

    def launch(self, rows: list[Row]) -> Work:
        work = Work(self, rows)
        self.queued.append(work)
        return work

    def advance(self) -> None:
        """The device does the next thing."""
        if not self.queued:
            return
        item = self.queued.popleft()
        if isinstance(item, list):
            self.connector.start_load_kv(item)
        elif isinstance(item, tuple):
            self.kv.numbers[list(item)] = POISON
        else:
            item.token_ids = [new for row in item.rows for new in self.forward(row)]

    def forward(self, row: Row) -> list[list[int]]:
        """Write what is new, check all that is read; the token that is drawn, if one is."""
        known, size, end = self.known[row.sequence], self.kv.block_size, row.begin + row.count
        expected = contents(known[:end], row.sequence.request.cache_salt)
        places = [(row.table[i // size], i % size) for i in range(end)]
        for place, number in zip(places[row.begin :], expected[row.begin :], strict=True):
            assert place[0] != POISON, "a token has no block"
            self.kv.numbers[place] = number
        read = [int(self.kv.numbers[place]) for place in places]
        wrong = [i for i in range(end) if read[i] != expected[i]]
        where = f"{row.sequence.request_id}: {row.begin} + {row.count}"
        assert not wrong, f"{where}: wrong keys and values at {wrong}, {[read[i] for i in wrong]}"
        if not row.is_sampled:
            return []
        assert len(known) == end
        known.append(drawn_after(read))
        return [known[-1:]]


read_config = lru_cache(module_of(PART, "engine").load_config)


class Kv:
    """In the place of the KV cache."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size, self.num_bytes = num_blocks, block_size, 0
        self.pool = module_of(PART, "kv_cache").BlockPool(num_blocks)
        self.data = torch.full((num_blocks, block_size), POISON, dtype=torch.int64)
        self.numbers = self.data.numpy()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)


class Rig:
    """An engine over a played device."""

    def __init__(self, host_blocks: int, disk: Disk | None = None, **flags: Any) -> None:
        config = module_of(PART, "config").EngineConfig(model="random:tiny-llama", **flags)
        config = config.resolved(torch.device("cpu"), 16)
        kv = Kv(config.num_blocks, config.block_size)
        self.copies = Copies(host_blocks if config.offload != "off" else 0, disk, kv)
        self.runner = Runner(config, kv, self.copies)
        engine = module_of(PART, "engine")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine, "load_runner", lambda config, folder: self.runner)
            patch.setattr(engine, "load_config", read_config)
            self.engine = engine.LLMEngine(config)
        self.connector = self.engine.connector
        self.expected: dict[str, list[int]] = {}
        self.outputs: dict[str, list[int]] = {}
        self.reasons: dict[str, str] = {}
        self.meaning: dict[bytes, tuple[int, ...]] = {}  # of keys that blocks were saved under
        self.cached: dict[str, int] = {}
        self.watch_pools()
        self.watch_keys()

    def watch_pools(self) -> None:
        """Poison blocks that are given out."""
        pool, host = self.runner.kv.pool, self.connector.host
        give, give_host = pool.allocate, host.allocate

        def allocate(count: int) -> list[int]:
            blocks = give(count)
            self.runner.poison(blocks)
            return blocks

        def allocate_host(count: int) -> list[int] | None:
            blocks = give_host(count)
            self.copies.numbers[blocks or []] = POISON
            return blocks

        pool.allocate, host.allocate = allocate, allocate_host

    def block_contents(self, sequence: Any) -> list[tuple[int, ...]]:
        """Of its full blocks."""
        size, salt = self.runner.kv.block_size, sequence.request.cache_salt
        numbers = contents(sequence.tokens(0, sequence.num_tokens), salt)
        return [tuple(numbers[i : i + size]) for i in range(0, len(numbers) - size + 1, size)]

    def watch_keys(self) -> None:
        """Note what blocks are saved as, and hold what is found against that."""
        connector, size = self.connector, self.runner.kv.block_size
        order, find = connector.order, connector.get_num_new_matched_tokens

        def noted(kind: str, sequence: Any, blocks: list[int], *rest: Any, **more: Any) -> None:
            order(kind, sequence, blocks, *rest, **more)
            if kind == "save" and more.get("keys"):
                whole = self.block_contents(sequence)
                for block, key in zip(blocks, more["keys"], strict=True):
                    numbers = whole[sequence.block_table.index(block)]
                    assert self.meaning.setdefault(key, numbers) == numbers, "one key, two blocks"

        def found(sequence: Any, num_computed: int) -> tuple[int | None, bool]:
            before = (dict(connector.host.of_key), list(connector.host.ref_counts))
            result = find(sequence, num_computed)
            assert find(sequence, num_computed) == result, "asking has changed something"
            assert before == (connector.host.of_key, connector.host.ref_counts)
            if sequence not in connector.swapped:
                known = [key for key in self.meaning if key in connector.host]
                there = {self.meaning[key] for key in known} if connector.keeps_prefixes else set()
                count = 0
                for numbers in self.block_contents(sequence)[num_computed // size :]:
                    if numbers not in there:
                        break
                    count += 1
                most = (sequence.num_cacheable_tokens - num_computed) // size
                assert result[0] == min(count, most) * size, "other than the host has"
            return result

        connector.order, connector.get_num_new_matched_tokens = noted, found

    def add(self, name: str, prompt: list[int], max_tokens: int, **options: Any) -> None:
        salt, stop = options.get("salt"), options.get("stop", ())
        params = SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=stop
        )
        request = Request(name, prompt, params, cache_salt=salt)
        self.engine.add_request(request)
        self.expected[name], self.outputs[name] = expected_output(request), []

    def step(self) -> None:
        for output in self.engine.step():
            name = output.request_id
            assert name not in self.reasons, f"{name} goes on after its end"
            self.outputs[name] += output.token_ids
            got = self.outputs[name]
            assert got == self.expected[name][: len(got)], f"{name}: other tokens"
            if output.finish_reason is not None:
                self.reasons[name] = output.finish_reason
                self.cached[name] = output.num_cached_tokens
                complete = self.expected[name] if output.finish_reason != "abort" else got
                assert got == complete, f"{name} has ended early"

    def finish(self) -> None:
        """Steps until all is quiet."""
        for _ in range(3000):
            if not self.engine.has_unfinished():
                break
            self.step()
            self.engine.check_integrity()
        assert not self.engine.has_unfinished(), "it never ends"
        assert set(self.reasons) == set(self.expected)
        stats = self.engine.stats()
        assert stats["num_used_blocks"] == 0 and not self.connector.swapped
        assert not self.connector.transfers and not self.connector.held()
        assert stats["num_used_host_blocks"] == len(self.connector.host.of_key)
        self.check_host()

    def check_host(self) -> None:
        """What can be found and is not on its way is what it was saved as."""
        host = self.connector.host
        for key, block in host.of_key.items():
            if host.ref_counts[block] == 1:
                assert tuple(self.copies.numbers[block]) == self.meaning[key], (
                    "a spoiled host block"
                )


def family(kind: int, length: int) -> list[int]:
    """Prompts that begin alike: in all, in the first 6 tokens, or not at all."""
    own = [(7 * i + 3 * kind) % 90 + 2 for i in range(length)]
    return [*range(2, 8), *own][:length] if kind < 2 else own


class Tier(RuleBasedStateMachine):
    """Requests come and go; device, copies and disk go on by themselves, or do not; copies fail."""

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
        self.rig = Rig(choices["host_blocks"], self.disk, **flags)
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
