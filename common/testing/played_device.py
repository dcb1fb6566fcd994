"""A device, copies and a disk that are played by hand: they do one thing at a time, when told to.

For tests of what is decided about KV blocks, with any order of events that real ones could bring. A
token's keys and values are one number, made of the salt and of all tokens up to it. So each step can
be told whether its sequences stand on what they should, and what a request must give is known
beforehand.
"""

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from common.kv_store import BlockCopies, Copy, block_copies
from common.kv_store.block_copies import move
from common.requests import Request
from common.testing.parts import module_of

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
        self.rank_sleep = SimpleNamespace(order=lambda level: None, held=[(0, 0)])
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


class Kv:
    """In the place of the KV cache."""

    def __init__(self, part: int, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size, self.num_bytes = num_blocks, block_size, 0
        self.pool = module_of(part, "kv_cache").BlockPool(num_blocks)
        self.data = torch.full((num_blocks, block_size), POISON, dtype=torch.int64)
        self.numbers = self.data.numpy()

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
