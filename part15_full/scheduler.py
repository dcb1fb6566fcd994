"""Which sequences run in a step, and with how many tokens.

Sequences join and leave the batch at every step (Yu et al., "Orca: A Distributed Serving System for
Transformer-Based Generative Models", OSDI 2022). The order is first come, first served. A step
has a budget of tokens. Each running sequence runs tokens of its own that are not computed: the
last one while it decodes, before that a slice of its prompt (Agrawal et al., "Taming
Throughput-Latency Tradeoff in LLM Inference with Sarathi-Serve", OSDI 2024).

A sequence takes blocks as it grows. When the pool is empty, the sequence that joined last is
preempted: it gives up its blocks and waits at the head of the queue. It keeps its output, and when
it joins again, prompt and output run as one prompt (recomputation, as in vLLM).

A sequence that joins takes the cached blocks of its longest known beginning, and computes the rest.
The full blocks of a step are published when its tokens are read: before that it may yet fail.

What the host's memory has of a sequence beyond that is copied into its blocks first. It holds them
and a row meanwhile, and waits for keys and values (`Status.LOADING`); then it runs.

Drafts run behind a sequence's last token, and count like other tokens. They get what is left: no
block is taken for them that would leave another sequence without one for its next token.

The scheduler does not wait for tokens. It counts those that are launched and not read
(placeholders), knows how many tokens each sequence may have, and so knows the next step before the
last one has ended. The device runs steps in the order in which they were scheduled: blocks that a
sequence gives up can be given to the next at once, though a step in flight still writes to them.

A pipeline's steps in flight draw for different sequences: one whose token is not read waits, and a
step takes of those that decode as many as there would be in each of the steps.
"""

import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from common.trace import Trace

from .block_cache import Match
from .config import EngineConfig
from .kv_cache import BlockPool, KVCache
from .kv_connector import KVConnector
from .prefix_cache import make_block_cache
from .sequence import TRANSITIONS, Sequence, Status


@dataclass
class SchedulerOutput:
    """One step's work. The token after a sequence's last one is sampled when the step runs that, and
    so is the token after each draft behind it."""

    num_new_tokens: dict[Sequence, int] = field(default_factory=dict)
    sampled: list[Sequence] = field(default_factory=list)
    num_tokens: int = 0
    admitted: list[Sequence] = field(default_factory=list)  # joined in this step, or came back
    new_blocks: dict[Sequence, list[int]] = field(default_factory=dict)  # at its table's end
    connector_meta: list[Any] = field(default_factory=list)  # what begins before the step

    def run(self, sequence: Sequence, count: int) -> None:
        """Let a sequence run its next `count` tokens."""
        self.num_new_tokens[sequence] = count
        self.num_tokens += count
        if sequence.num_computed_tokens + count >= sequence.num_total_tokens:
            self.sampled.append(sequence)


class Scheduler:
    """The waiting and the running sequences, and the blocks and table rows that these hold."""

    def __init__(
        self, config: EngineConfig, kv: KVCache, trace: Trace, connector: KVConnector
    ) -> None:
        self.is_continuous, self.num_joining = config.continuous_batching, 0
        self.slices_prompts = config.enable_chunked_prefill
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.long_prefill_threshold = config.long_prefill_threshold or sys.maxsize
        self.num_stages = config.pipeline_parallel_size
        self.kv, self.trace = kv, trace
        self.connector, self.kind_of_cache = connector, config.prefix_cache
        self.forget_cache()
        self.waiting: deque[Sequence] = deque()
        # In the order in which they joined. A list would be searched for each one that leaves.
        self.running: dict[Sequence, None] = {}
        self.ending: set[Sequence] = set()  # their last tokens are launched
        self.loading: dict[Sequence, None] = {}  # in the order in which they were given blocks
        self.resumed: list[Sequence] = []  # were loading, and run from the next step on
        self.most_drafts = config.num_speculative_tokens or 0
        # A model that drafts writes keys and values of its drafts before they are scheduled.
        self.num_lookahead = self.most_drafts if config.speculative in ("draft", "self") else 0
        self.num_rows = config.max_num_seqs
        self.free_rows = deque(range(self.num_rows))
        self.num_preemptions = 0
        self.num_recomputed_tokens = 0  # after preemptions
        self.num_cache_queries = 0  # tokens of sequences that joined for the first time
        self.num_cache_hits = 0  # of these tokens, found in the cache

    def forget_cache(self) -> None:
        """All blocks are free, and nothing is known of what is in them. No sequence may have any."""
        self.kv.pool = BlockPool(self.kv.num_blocks)
        self.cache = make_block_cache(self.kind_of_cache, self.kv.pool, self.kv.block_size)
        self.connector.bind_block_cache(self.cache)

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the queue."""
        self.trace.arrived(sequence.request_id, sequence.num_tokens)
        self.waiting.append(sequence)
        self.connector.on_new_request(sequence)

    def update_connector_output(self, finished: Iterable[Any]) -> None:
        """Sequences whose keys and values have come run from the next step on, with what is there."""
        for sequence, num_tokens in self.connector.update_connector_output(finished):
            if sequence in self.loading:
                self.resume(sequence)
                sequence.num_computed_tokens += num_tokens
                self.trace.loaded(sequence.request_id, num_tokens)
                self.cache.publish(sequence, sequence.num_computed_tokens)

    def schedule(self) -> SchedulerOutput:
        """The next step's work; empty when there is none."""
        output = SchedulerOutput()
        begins = self.running if self.slices_prompts else self.unsliced_prompts()
        was_room = self.run_running(begins, output)
        for sequence in self.resumed:
            if sequence.status is Status.RUNNING:
                self.join(sequence, output)
        self.resumed = []
        if was_room:
            self.admit(output)
        if not (self.slices_prompts or output.num_tokens):
            self.run_running(self.running, output)
        output.connector_meta = self.connector.build_connector_meta(output)
        counts = output.num_new_tokens.items()
        self.trace.scheduled_all({sequence.request_id: count for sequence, count in counts})
        return output

    def unsliced_prompts(self) -> list[Sequence]:
        """Running sequences that have waited for keys and values, and run the rest of their prompts
        now."""
        left = {s: s.num_total_tokens - s.num_computed_tokens for s in self.running}
        return [s for s, count in left.items() if count > 1 or s in self.resumed]

    def run_running(self, sequences: Iterable[Sequence], output: SchedulerOutput) -> bool:
        """More tokens of running sequences, the oldest first, while budget and blocks last.

        Returns whether blocks have lasted.
        """
        was_room, share = True, -(-len(self.running) // self.num_stages)
        for sequence in list(sequences):
            left = sequence.num_total_tokens - sequence.num_computed_tokens
            if not self.has_budget(left, output):
                break
            if not self.can_run(sequence) or (left == 1 and len(output.sampled) >= share):
                continue
            room = len(sequence.block_table) * self.kv.block_size
            wanted = sequence.num_total_tokens + len(sequence.draft_token_ids) + self.num_lookahead
            if wanted <= room or self.make_room(sequence, output):
                output.run(sequence, self.slice_of(sequence, output))
            else:
                was_room = False
        return was_room

    def has_budget(self, count: int, output: SchedulerOutput) -> bool:
        """Whether the step has room for some of a sequence's next `count` tokens, or for all of them
        where prompts are not sliced. A step's first prompt may be longer, or it would never run."""
        budget = self.max_num_batched_tokens - output.num_tokens
        return budget > 0 if self.slices_prompts else count <= budget or not output.num_tokens

    def can_run(self, sequence: Sequence) -> bool:
        """Whether the next tokens of a running sequence can be launched. With one stage the device
        knows them; with more, the stage that begins with them is ahead of the one that draws."""
        return self.num_stages == 1 or not sequence.num_placeholders

    def make_room(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Give a running sequence blocks for all of its tokens, if need be by preempting the sequences
        that joined last; False when it does not run in this step."""
        while sequence.status is Status.RUNNING and not self.grow(sequence, output):
            last = next(reversed(self.running))
            if self.ending or self.connector.will_free or not self.can_run(last):
                return False  # blocks come free when tokens are read, or copies are done
            self.preempt(last)
        return sequence.status is Status.RUNNING

    def admit(self, output: SchedulerOutput) -> None:
        """Let sequences join from the head of the queue, while budget and blocks last.

        A sequence joins only when there are blocks for its whole prompt, even if this step computes
        only the first slice: prompts that are half computed and wait for each other's blocks would
        end in preemptions. Each running sequence is left a block to grow into. A sequence that was
        preempted with a token in flight joins when that is read.

        Without continuous batching the next batch is of those that wait when all of the last one have
        ended, as many as there are rows and blocks for.
        """
        if self.is_continuous or not (self.running or self.ending or self.loading):
            self.num_joining = min(len(self.waiting), len(self.free_rows))
        while self.waiting and self.num_joining and self.has_budget(1, output):
            sequence = self.waiting[0]
            if sequence.num_placeholders:
                break
            found = self.cache.match(sequence)
            num_found = len(found.blocks) * self.kv.block_size
            if not self.has_budget(sequence.num_total_tokens - num_found, output):
                break
            num_external, _ = self.connector.get_num_new_matched_tokens(sequence, num_found)
            if num_external is None:
                break
            needed = self.kv.blocks_for(sequence.num_total_tokens) - len(found.blocks)
            others = len(self.running) + len(self.loading)
            if needed + others > self.cache.num_free - found.num_free:
                self.num_joining = 0
                break
            self.num_joining -= 1
            self.start(sequence, Status.LOADING if num_external else Status.RUNNING)
            self.take(sequence, found)
            self.grow(sequence, output)
            self.connector.update_state_after_alloc(sequence, num_external)
            if not num_external:
                self.join(sequence, output)
                output.run(sequence, self.slice_of(sequence, output))

    def take(self, sequence: Sequence, found: Match) -> None:
        """Let a sequence begin with the blocks that were found for it."""
        self.cache.take(sequence, found)
        sequence.block_table = found.blocks
        sequence.num_computed_tokens = len(found.blocks) * self.kv.block_size
        self.trace.allocated(sequence.request_id, found.blocks)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed_tokens
            self.num_cache_queries += sequence.num_tokens
            self.num_cache_hits += sequence.num_cached_tokens

    def join(self, sequence: Sequence, output: SchedulerOutput) -> None:
        """A sequence begins to run, with the keys and values that there are."""
        self.trace.cached(sequence.request_id, sequence.num_computed_tokens)
        self.num_recomputed_tokens += max(
            sequence.num_lost_tokens - sequence.num_computed_tokens, 0
        )
        sequence.num_lost_tokens = 0
        output.admitted.append(sequence)

    def slice_of(self, sequence: Sequence, output: SchedulerOutput) -> int:
        """How many tokens a sequence runs: what is not computed, as far as the step's budget goes.

        One and its drafts for a sequence that decodes, a slice of a prompt; nothing else tells them
        apart. Drafts beyond that are dropped.
        """
        num_drafts = len(sequence.draft_token_ids)
        left = sequence.num_total_tokens + num_drafts - sequence.num_computed_tokens
        budget = self.max_num_batched_tokens - output.num_tokens
        if not self.slices_prompts:
            budget = max(budget, left - num_drafts)
        count = min(left, budget, self.long_prefill_threshold)
        if count < left:
            del sequence.draft_token_ids[max(num_drafts - (left - count), 0) :]
        return count

    def grow(self, sequence: Sequence, output: SchedulerOutput) -> bool:
        """Give a sequence blocks for all of its tokens; False when there are not enough.

        Drafts get blocks only if every other running sequence can still have one; the rest of them
        is dropped.
        """
        num_tokens, num_blocks = sequence.num_total_tokens, len(sequence.block_table)
        missing = max(self.kv.blocks_for(num_tokens) - num_blocks, 0)
        drafts = len(sequence.draft_token_ids) + (self.num_lookahead if sequence.may_draft else 0)
        wanted = self.kv.blocks_for(min(num_tokens + drafts, sequence.limit)) - num_blocks
        if missing < wanted <= self.cache.num_free - len(self.running):
            missing = wanted
        if missing > 0:
            if missing > self.cache.num_free:
                return False
            blocks = self.cache.allocate(missing)
            self.trace.allocated(sequence.request_id, blocks)
            sequence.block_table += blocks
            output.new_blocks[sequence] = blocks
        room = len(sequence.block_table) * self.kv.block_size
        del sequence.draft_token_ids[room - num_tokens :]
        return True

    def num_tokens_ahead(self) -> int:
        """About how many tokens the next step runs, without drafts."""
        ready = filter(self.can_run, self.running)
        ahead = [s.num_total_tokens - s.num_computed_tokens for s in ready]
        if self.waiting and self.free_rows:
            num_tokens = self.waiting[0].num_total_tokens
            if self.kv.blocks_for(num_tokens) <= self.cache.num_free:
                ahead.append(num_tokens)
        return min(sum(ahead), self.max_num_batched_tokens)

    def advance(self, output: SchedulerOutput) -> None:
        """A step is launched: its tokens count as computed, and those that it samples as tokens. A
        sequence whose last token is among these gives up its row at once."""
        for sequence, count in output.num_new_tokens.items():
            sequence.num_computed_tokens += count
        for sequence in output.sampled:
            sequence.num_total_tokens += 1
            if sequence.num_total_tokens == sequence.limit:
                self.end(sequence)

    def publish(self, output: SchedulerOutput, later: list[SchedulerOutput]) -> None:
        """A step is read: other sequences may find what its sequences have computed until then.

        later: the steps that were launched since.
        """
        for sequence in output.num_new_tokens:
            if sequence.num_computed_tokens // self.kv.block_size > sequence.num_published_blocks:
                unread = sum(step.num_new_tokens.get(sequence, 0) for step in later)
                final = min(sequence.num_computed_tokens - unread, sequence.num_tokens)
                self.cache.publish(sequence, final)

    # The life of a sequence: nothing else changes its status.

    def start(self, sequence: Sequence, status: Status = Status.RUNNING) -> None:
        """The head of the queue joins the running sequences, or those that are loading."""
        self.become(sequence, status)
        joined = self.running if status is Status.RUNNING else self.loading
        joined[self.waiting.popleft()] = None
        sequence.row = self.free_rows.popleft()

    def resume(self, sequence: Sequence) -> None:
        """A sequence that was loading joins the running sequences."""
        self.become(sequence, Status.RUNNING)
        del self.loading[sequence]
        self.running[sequence] = None
        self.resumed.append(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Take the blocks of a running sequence, and put it at the head of the queue."""
        self.become(sequence, Status.WAITING)
        self.stop(sequence)
        is_kept = self.connector.request_preempted(sequence)
        sequence.num_lost_tokens = 0 if is_kept else sequence.num_computed_tokens
        self.release(sequence)
        self.waiting.appendleft(sequence)
        self.trace.preempted(sequence.request_id)
        self.num_preemptions += 1

    def end(self, sequence: Sequence) -> None:
        """A running sequence has its last token launched, and runs no more."""
        self.become(sequence, Status.ENDING)
        self.stop(sequence)
        self.ending.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence, whatever its status."""
        was = sequence.status
        self.connector.request_finished(sequence)
        self.become(sequence, Status.FINISHED)
        if was is Status.WAITING:
            self.waiting.remove(sequence)
        elif was is Status.ENDING:
            self.ending.remove(sequence)
        else:
            self.stop(sequence)
        if was is not Status.WAITING:
            self.release(sequence)

    def become(self, sequence: Sequence, status: Status) -> None:
        """Change a sequence's status, if there is such a transition."""
        is_legal = status in TRANSITIONS[sequence.status]
        assert is_legal, f"{sequence.request_id}: {sequence.status.value} -> {status.value}"
        sequence.status = status

    def stop(self, sequence: Sequence) -> None:
        """Take the row of a sequence that runs or is loading."""
        del (self.loading if sequence in self.loading else self.running)[sequence]
        self.free_rows.append(sequence.row)
        sequence.row = None
        sequence.draft_token_ids, sequence.draft_probs = [], None

    def release(self, sequence: Sequence) -> None:
        """Take a sequence's blocks."""
        self.cache.release(sequence)
        self.trace.freed(sequence.request_id, sequence.block_table)
        sequence.block_table = []
        sequence.num_computed_tokens = sequence.num_drafter_tokens = sequence.num_saved_blocks = 0

    def check_integrity(self) -> None:
        """Assert that statuses are true, and that rows and blocks have one owner each or are free."""
        for sequence in self.waiting:
            assert sequence.status is Status.WAITING, f"{sequence.request_id}: {sequence.status}"
            assert not sequence.block_table, f"{sequence.request_id} waits and has blocks"
        for sequence in self.ending:
            assert sequence.status is Status.ENDING, f"{sequence.request_id}: {sequence.status}"
        for sequence in [*self.waiting, *self.ending]:
            assert sequence.row is None, f"{sequence.request_id} does not run and has a row"
        for sequence in self.loading:
            assert sequence.status is Status.LOADING, f"{sequence.request_id}: {sequence.status}"
        rows = [*self.free_rows, *(s.row for s in [*self.running, *self.loading])]
        assert sorted(rows) == list(range(self.num_rows)), f"rows lost or given twice: {rows}"
        for sequence in self.running:
            assert sequence.status is Status.RUNNING, f"{sequence.request_id}: {sequence.status}"
            drafts = len(sequence.draft_token_ids) if sequence.num_placeholders else 0
            computed, total = sequence.num_computed_tokens - drafts, sequence.num_total_tokens
            assert computed < total, f"{sequence.request_id}: {computed} of {total} tokens"
            longest = min(total + 2 * self.most_drafts, sequence.limit)
            room, most = len(sequence.block_table), self.kv.blocks_for(longest)
            assert self.kv.blocks_for(computed) <= room <= most, f"{sequence.request_id}: {room}"
        owners = [*self.running, *self.ending, *self.loading]
        tables = [sequence.block_table for sequence in owners]
        self.cache.check_integrity(tables + self.connector.held())
        self.connector.check_integrity()
