"""Which sequences run in a step, and with how many tokens.

Sequences join and leave the batch at every step (Yu et al., "Orca: A Distributed Serving System for
Transformer-Based Generative Models", OSDI 2022). The order is first come, first served. A step
runs either the prompts of the sequences that join, or one more token of each running sequence.

A sequence takes blocks as it grows. When the pool is empty, the sequence that joined last is
preempted: it gives up its blocks and waits at the head of the queue. It keeps its output, and when
it joins again, prompt and output run as one prompt (recomputation, as in vLLM).
"""

from collections import deque
from dataclasses import dataclass, field

from common.trace import Trace

from .config import EngineConfig
from .kv_cache import KVCache
from .sequence import TRANSITIONS, Sequence, Status


@dataclass
class SchedulerOutput:
    """One step's work. The token after a sequence's last one is sampled when the step runs that."""

    num_new_tokens: dict[Sequence, int] = field(default_factory=dict)
    sampled: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0

    def run(self, sequence: Sequence, count: int) -> None:
        """Let a sequence run its next `count` tokens."""
        self.num_new_tokens[sequence] = count
        self.num_tokens += count
        if sequence.num_computed_tokens + count >= sequence.num_tokens:
            self.sampled.append(sequence)


class Scheduler:
    """The waiting and the running sequences, and the blocks that these hold."""

    def __init__(self, config: EngineConfig, kv: KVCache, trace: Trace) -> None:
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.kv, self.trace = kv, trace
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they joined
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.trace.arrived(sequence.request_id, sequence.num_tokens)
        self.waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        """The next step's work; empty when there is none."""
        output = SchedulerOutput()
        self.admit(output)
        if not output.num_tokens:
            self.run_running(output)
        for sequence, count in output.num_new_tokens.items():
            self.trace.scheduled(sequence.request_id, count)
        return output

    def run_running(self, output: SchedulerOutput) -> None:
        """One more token of each running sequence, the oldest first, while blocks last."""
        for sequence in list(self.running):
            if self.make_room(sequence):
                output.run(sequence, 1)

    def make_room(self, sequence: Sequence) -> bool:
        """Give a running sequence blocks for all of its tokens, if need be by preempting the sequences
        that joined last; False when it was preempted itself."""
        while sequence.status is Status.RUNNING and not self.grow(sequence):
            self.preempt(self.running[-1])
        return sequence.status is Status.RUNNING

    def admit(self, output: SchedulerOutput) -> None:
        """Let sequences join from the head of the queue, each with all of its tokens.

        The first may be longer than the budget, or it would never run. Each running sequence is
        left a block to grow into: without it the new sequence would soon be preempted.
        """
        while self.waiting and len(self.running) < self.max_num_seqs:
            sequence = self.waiting[0]
            count = sequence.num_tokens
            is_over = output.num_tokens + count > self.max_num_batched_tokens
            needed = self.kv.blocks_for(count) + len(self.running)
            if (output.num_tokens and is_over) or not self.kv.pool.can_allocate(needed):
                break
            self.start(sequence)
            self.grow(sequence)
            output.run(sequence, count)

    def grow(self, sequence: Sequence) -> bool:
        """Give a sequence blocks for all of its tokens; False when there are not enough."""
        missing = self.kv.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        if missing > 0:
            if not self.kv.pool.can_allocate(missing):
                return False
            blocks = self.kv.pool.allocate(missing)
            self.trace.allocated(sequence.request_id, blocks)
            sequence.block_table += blocks
        return True

    def advance(self, output: SchedulerOutput) -> None:
        """A step has run: its tokens are computed."""
        for sequence, count in output.num_new_tokens.items():
            sequence.num_computed_tokens += count

    # The life of a sequence: nothing else changes its status.

    def start(self, sequence: Sequence) -> None:
        """The head of the queue joins the running sequences."""
        self.become(sequence, Status.RUNNING)
        self.running.append(self.waiting.popleft())

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence, and put it at the head of the queue."""
        self.become(sequence, Status.WAITING)
        self.running.remove(sequence)
        self.release(sequence)
        self.waiting.appendleft(sequence)
        self.trace.preempted(sequence.request_id)
        self.num_preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its status."""
        was = sequence.status
        self.become(sequence, Status.FINISHED)
        if was is Status.WAITING:
            self.waiting.remove(sequence)
        else:
            self.running.remove(sequence)
            self.release(sequence)

    def become(self, sequence: Sequence, status: Status) -> None:
        """Change a sequence's status, if there is such a transition."""
        is_legal = status in TRANSITIONS[sequence.status]
        assert is_legal, f"{sequence.request_id}: {sequence.status.value} -> {status.value}"
        sequence.status = status

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks."""
        self.kv.pool.free(sequence.block_table)
        self.trace.freed(sequence.request_id, sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def check_integrity(self) -> None:
        """Assert that statuses are true, and that each block has one owner or is free."""
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING, f"{sequence.request_id}: {sequence.status}"
            assert not sequence.block_table, f"{sequence.request_id} waits and has blocks"
        for sequence in self.running:
            assert sequence.status is Status.RUNNING, f"{sequence.request_id}: {sequence.status}"
            computed, total = sequence.num_computed_tokens, sequence.num_tokens
            assert computed == total - 1, f"{sequence.request_id}: {computed} of {total} tokens"
            room, most = len(sequence.block_table), self.kv.blocks_for(total)
            assert self.kv.blocks_for(computed) <= room <= most, f"{sequence.request_id}: {room}"
        self.kv.pool.check_integrity([sequence.block_table for sequence in self.running])
