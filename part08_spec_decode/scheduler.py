"""Who runs in this step, and with how many tokens.

Sequences join and leave at every step (Yu et al., "Orca: A Distributed Serving System for
Transformer-Based Generative Models", OSDI 2022). First come, first served: nobody overtakes. A step
has a budget of tokens: everyone who runs gets what is not computed yet, those who decode a token,
those whose prompt is not done a slice of it (Agrawal et al., "Taming Throughput-Latency Tradeoff in
LLM Inference with Sarathi-Serve", OSDI 2024). Blocks are taken when they are needed; when there are
none left, the sequence that joined last gives up its own and waits at the head of the queue. It
keeps its output: when it comes back, prompt and output run again as one prompt (recomputation, as
in vLLM).

Who joins begins with the blocks that others have computed for the same tokens, and computes the
rest. What a step has computed can be found by others as soon as its tokens are read: before that it
may yet fail.

Drafts run behind a sequence's last token, and count like other tokens. They get what is left: no
block is taken for them that would leave another sequence without one for its next token.

The scheduler does not wait for tokens. It counts those that are on their way (placeholders), knows
how many each sequence may have, and so knows its next step before the last one has ended. Steps run
on the device in the order in which they were scheduled: blocks that are given up can be given to
the next at once, though a step in flight still writes to them.
"""

import itertools
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from common.trace import Trace

from .config import EngineConfig
from .kv_cache import KVCache
from .prefix_cache import make_prefix_cache
from .sequence import Sequence


@dataclass
class SchedulerOutput:
    """One step's work. A sequence is sampled when its last token is among those it runs, and at
    each draft behind that."""

    num_new_tokens: dict[Sequence, int] = field(default_factory=dict)
    admitted: list[Sequence] = field(default_factory=list)  # joined in this step, or came back
    new_blocks: dict[Sequence, list[int]] = field(default_factory=dict)  # at its table's end
    num_tokens: int = 0

    def run(self, sequence: Sequence, count: int) -> None:
        """Let a sequence run its next `count` tokens."""
        self.num_new_tokens[sequence] = count
        self.num_tokens += count


class Scheduler:
    """The queue, the running sequences, and the blocks and table rows that they hold."""

    def __init__(self, config: EngineConfig, kv: KVCache, trace: Trace) -> None:
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.long_prefill_threshold = config.long_prefill_threshold or sys.maxsize
        self.kv, self.trace = kv, trace
        self.cache = make_prefix_cache(config.prefix_cache, kv.pool, kv.block_size)
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in the order in which they joined
        self.leaving: set[Sequence] = set()  # their last tokens are on their way
        # A model that drafts writes keys and values of its drafts before they are scheduled.
        self.most_drafts = config.num_speculative_tokens or 0
        self.num_lookahead = self.most_drafts if config.speculative in ("draft", "self") else 0
        self.drafted_blocks: set[int] = set()  # that a draft model of its own has filled too
        self.num_rows = config.max_num_seqs
        self.free_rows = deque(range(self.num_rows))
        self.num_preemptions = 0
        self.num_cache_queries = 0  # tokens of those who joined for the first time
        self.num_cache_hits = 0  # tokens that were found for them

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.trace.arrived(sequence.request_id, sequence.num_tokens)
        self.waiting.append(sequence)

    def schedule(self) -> SchedulerOutput:
        """The next step's work; empty when there is none."""
        output = SchedulerOutput()
        if self.go_on(output):
            self.admit(output)
        for sequence, count in output.num_new_tokens.items():
            self.trace.scheduled(sequence.request_id, count)
        return output

    def go_on(self, output: SchedulerOutput) -> bool:
        """More tokens of the running sequences, the oldest first, while budget and blocks last.

        Returns whether blocks have lasted.
        """
        was_room = True
        for sequence in list(self.running):
            if output.num_tokens == self.max_num_batched_tokens:
                break
            if self.make_room(sequence, output):
                count = self.slice_of(sequence, output)
                num_drafts = sequence.num_computed_tokens + count - sequence.num_tokens
                del sequence.draft_token_ids[max(num_drafts, 0) :]
                output.run(sequence, count)
            else:
                was_room = False
        return was_room

    def make_room(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Give a sequence blocks for all of its tokens, those of the sequences that joined last if
        need be; False when it does not run in this step."""
        while sequence.row is not None and not self.grow(sequence, output):
            if self.leaving:
                return False  # their blocks come free when their last tokens are read
            self.preempt(self.running[-1])
        return sequence.row is not None

    def admit(self, output: SchedulerOutput) -> None:
        """Let sequences join from the head of the queue, while budget and blocks last.

        Who joins takes the blocks of its whole prompt, though it begins with a slice of it: prompts
        that are half computed and wait for each other's blocks would end in preemptions. Each
        running sequence is left a block to grow into. One that was preempted with a token on its
        way joins when that is read.
        """
        while self.waiting and self.free_rows and output.num_tokens < self.max_num_batched_tokens:
            sequence = self.waiting[0]
            if sequence.num_placeholders or not self.begin(sequence):
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.row = self.free_rows.popleft()
            self.grow(sequence, output)
            output.new_blocks[sequence] = list(sequence.block_table)
            output.admitted.append(sequence)
            output.run(sequence, self.slice_of(sequence, output))

    def begin(self, sequence: Sequence) -> bool:
        """Give a sequence the blocks that the cache has for it, if there is room for the others."""
        found = self.cache.match(sequence)
        sequence.block_table = found
        needed = self.kv.blocks_for(sequence.num_tokens) - len(found) + len(self.running)
        if needed > self.cache.num_free:
            self.cache.release(sequence)
            sequence.block_table = []
            return False
        sequence.num_computed_tokens = len(found) * self.kv.block_size
        self.trace.allocated(sequence.request_id, found)
        self.trace.cached(sequence.request_id, sequence.num_computed_tokens)
        drafted = itertools.takewhile(self.drafted_blocks.__contains__, found)
        sequence.num_drafted_kv = len(list(drafted)) * self.kv.block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_cache_queries += sequence.num_tokens
            self.num_cache_hits += sequence.num_cached_tokens
        return True

    def slice_of(self, sequence: Sequence, output: SchedulerOutput) -> int:
        """How many tokens a sequence runs: what is not computed, as far as the step's budget goes.

        One and its drafts for a sequence that decodes, a slice for a prompt; nothing else tells them
        apart.
        """
        num_tokens = sequence.num_tokens + len(sequence.draft_token_ids)
        left = num_tokens - sequence.num_computed_tokens
        budget = self.max_num_batched_tokens - output.num_tokens
        return min(left, budget, self.long_prefill_threshold)

    def grow(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Give a sequence blocks for all of its tokens; False when there are not enough.

        And for its drafts, unless others would miss them; drafts that find no place are dropped.
        """
        missing = self.kv.blocks_for(sequence.num_tokens) - len(sequence.block_table)
        num_drafts = len(sequence.draft_token_ids) + self.num_lookahead * sequence.may_draft
        most = min(sequence.num_tokens + num_drafts, sequence.limit)
        wanted = self.kv.blocks_for(most) - len(sequence.block_table)
        if wanted > max(missing, 0) and wanted + len(self.running) <= self.cache.num_free:
            missing = wanted
        if missing > 0:
            if missing > self.cache.num_free:
                return False
            blocks = self.cache.allocate(missing)
            self.drafted_blocks.difference_update(blocks)
            self.trace.allocated(sequence.request_id, blocks)
            sequence.block_table += blocks
            output.new_blocks[sequence] = blocks
        room = len(sequence.block_table) * self.kv.block_size
        del sequence.draft_token_ids[room - sequence.num_tokens :]
        return True

    def note_drafted(self, sequence: Sequence) -> None:
        """Remember which blocks a draft model has filled: whoever finds them need not do it again."""
        final = min(sequence.num_drafted_kv, sequence.num_known_tokens) // self.kv.block_size
        self.drafted_blocks.update(sequence.block_table[:final])

    def num_tokens_ahead(self) -> int:
        """About how many tokens the next step runs, without drafts."""
        ahead = [s.num_tokens - s.num_computed_tokens for s in self.running]
        if self.waiting and self.free_rows:
            num_tokens = self.waiting[0].num_tokens
            if self.kv.blocks_for(num_tokens) <= self.cache.num_free:
                ahead.append(num_tokens)
        return min(sum(ahead), self.max_num_batched_tokens)

    def launched(self, num_new_tokens: dict[Sequence, int], sampled: list[Sequence]) -> None:
        """Count what is on its way now; who gets the last token that it may have gives up its row,
        and its blocks when that is read and they can be found by others."""
        for sequence, count in num_new_tokens.items():
            sequence.num_computed_tokens += count
        for sequence in sampled:
            sequence.num_placeholders += 1
            if sequence.num_tokens == sequence.limit:
                self.stop(sequence)
                self.leaving.add(sequence)

    def computed(self, output: SchedulerOutput, later: Iterable[SchedulerOutput]) -> None:
        """A step's tokens are read: others may find what its sequences have computed until then.

        later: the steps that were launched since.
        """
        for sequence in output.num_new_tokens:
            if sequence.block_table:
                unread = sum(step.num_new_tokens.get(sequence, 0) for step in later)
                final = min(sequence.num_computed_tokens - unread, sequence.num_known_tokens)
                self.cache.publish(sequence, final)

    def preempt(self, sequence: Sequence) -> None:
        """Take everything from a running sequence but its tokens, and let it wait before others."""
        self.release(sequence)
        self.waiting.appendleft(sequence)
        self.trace.preempted(sequence.request_id)
        self.num_preemptions += 1

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is."""
        if sequence in self.leaving:
            self.leaving.remove(sequence)
            self.give_up(sequence)
        elif sequence.row is None:
            self.waiting.remove(sequence)
        else:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and row."""
        self.stop(sequence)
        self.give_up(sequence)

    def stop(self, sequence: Sequence) -> None:
        """Take a running sequence's row."""
        self.running.remove(sequence)
        self.free_rows.append(sequence.row)
        sequence.row = None
        sequence.draft_token_ids = []

    def give_up(self, sequence: Sequence) -> None:
        """Take a sequence's blocks."""
        self.cache.release(sequence)
        self.trace.freed(sequence.request_id, sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = 0

    def check_integrity(self) -> None:
        """Assert that rows and blocks have one owner each, or are free."""
        for sequence in self.waiting:
            assert not sequence.block_table, f"{sequence.request_id} waits and has blocks"
        for sequence in [*self.waiting, *self.leaving]:
            assert sequence.row is None, f"{sequence.request_id} waits and has row {sequence.row}"
        rows = [*self.free_rows, *(sequence.row for sequence in self.running)]
        everyone = list(range(self.num_rows))
        assert sorted(rows) == everyone, f"rows lost or given twice: {sorted(rows)}"
        for sequence in self.running:
            computed, room = sequence.num_computed_tokens, len(sequence.block_table)
            assert computed < sequence.num_tokens, f"{sequence.request_id}: {computed} tokens"
            most = self.kv.blocks_for(
                min(sequence.num_tokens + 2 * self.most_drafts, sequence.limit)
            )
            assert self.kv.blocks_for(computed) <= room <= most, f"{sequence.request_id}: {room}"
        owners = [*self.running, *self.leaving]
        self.cache.check_integrity([sequence.block_table for sequence in owners])
