"""The engine: a step asks the scheduler which sequences run, runs them, and appends new tokens.

Sequences join and leave between steps. A step is one forward over the new tokens of all of them.
The next step is scheduled and launched before the tokens of the last one are read, so that the
device need not wait for the host. With speculation it is not: what is drafted depends on them.

Work is cut into steps, so that requests can be added and aborted in between.
"""

import random
import time
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from common.completions import Completion, RequestOutput, TokenLogprobs, run_to_completion
from common.memory import fall_asleep, wake_up
from common.models.checkpoint import eos_token_ids, load_config, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.prompt_logprobs import add_prompt_logprobs
from common.requests import ParamsForPrompts, Prompts, Request, check_request, make_requests
from common.sampling import MAX_N
from common.structured.grammar import Grammar
from common.trace import Trace, phase

from .compatibility import check_machine
from .config import EngineConfig
from .device_queue import Work
from .disaggregation import make_connector
from .model_runner import Batch, load_runner
from .sampler import Sampled
from .scheduler import Scheduler, SchedulerOutput
from .sequence import Sequence, Status
from .speculative import make_speculator
from .structured_output import Grammars

WAIT_SECONDS = 0.001  # for a copy, before new requests are looked for


@dataclass(frozen=True)
class PendingStep:
    """A step that is launched and not read."""

    number: int  # in the trace
    scheduled: SchedulerOutput
    work: Work


class LLMEngine:
    """Many sequences at a time, first come, first served. Not safe from several threads."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model. Raises ValueError when it cannot be had."""
        check_machine(config)
        folder = resolve(config.model)
        self.tokenizer = Tokenizer.load(folder)
        self.runner = load_runner(config, folder)
        weakref.finalize(self, self.runner.ranks.close_soon).atexit = False  # they end with us then
        self.eos_token_ids = eos_token_ids(folder, load_config(folder, quantized=True))
        self.sampling_defaults = sampling_defaults(folder, config.generation_config)
        self.config = self.runner.config  # with what depends on the device
        self.vocab_size = self.runner.model.config.vocab_size
        self.kv, self.max_model_len = self.runner.kv, self.runner.max_model_len
        self.seeds = random.Random(config.seed)  # for requests that bring none
        self.sequences: dict[str, Sequence] = {}  # by request id, until they finish
        self.outbox: list[RequestOutput] = []  # what the next step returns
        self.trace = Trace(num_blocks=self.kv.num_blocks, block_size=self.kv.block_size)
        self.connector = make_connector(self.config, self.kv, self.runner.connector)
        self.scheduler = Scheduler(self.config, self.kv, self.trace, self.connector)
        self.speculator = make_speculator(self.config, self.runner, self.trace)
        self.in_flight: deque[PendingStep] = deque()
        # steps that are launched before the first of them is read
        num_in_flight = self.speculator.num_in_flight if self.config.async_scheduling else 1
        self.num_in_flight = max(num_in_flight, self.config.pipeline_parallel_size)
        self.scheduled: SchedulerOutput | None = None  # what is being launched or read
        self.grammars = Grammars(self)
        self.sleep_level = 0  # awake

    def generate(
        self,
        prompts: Prompts,
        sampling_params: ParamsForPrompts = None,
        progress: bool = True,
        cache_salt: str | None = None,
        may_draft: bool = True,
        grammar: Grammar | None = None,
    ) -> list[Completion]:
        """Complete each prompt, text or token ids, `n` times. Raises ValueError before any work."""
        if self.sleep_level:
            raise ValueError("the engine sleeps: wake_up comes first")
        self.grammars.check(grammar)
        options = {"cache_salt": cache_salt, "may_draft": may_draft, "grammar": grammar}
        requests = make_requests(
            self, prompts, sampling_params, MAX_N, prompt_logprobs=True, **options
        )
        return run_to_completion(self, requests, progress)

    def add_request(self, request: Request) -> None:
        """Put a request at the end of the queue. Raises ValueError when it cannot be run."""
        if request.request_id in self.sequences:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        check_request(request, self.max_model_len, self.vocab_size)
        seed = request.params.seed
        sequence = Sequence(
            request,
            seed=self.seeds.getrandbits(64) if seed is None else seed,
            ending_token_ids=self.grammars.ending_token_ids(request),
            limit=request.limit(self.max_model_len),
        )
        self.grammars.add(sequence)
        self.sequences[request.request_id] = sequence

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """End a request; the next step returns its last output. Unknown ids are finished ones."""
        if request_id in self.sequences:
            sequence = self.sequences[request_id]
            self.finish(sequence)
            self.emit(sequence, [], [], reason)

    def step(self) -> list[RequestOutput]:
        """Launch more tokens of each sequence; then read what was launched before.

        Returns what is new, at times nothing.
        """
        with self.trace.step() as record:
            self.scheduled = None  # so that fail_step knows, should scheduling fail
            self.scheduled = scheduled = self.schedule()
            self.runner.transfer(scheduled.connector_meta)
            if scheduled.num_tokens:
                batch = self.prepare(scheduled)
                work = self.launch(batch)
                self.scheduler.advance(scheduled)
                self.in_flight.append(PendingStep(record.step, scheduled, work))
            is_full = len(self.in_flight) == self.num_in_flight
            if self.in_flight and (is_full or not scheduled.num_tokens):
                pending = self.in_flight.popleft()
                self.scheduled = scheduled = pending.scheduled
                self.postprocess(scheduled, self.wait(pending))
                seconds = time.perf_counter() - record.begin
                self.speculator.propose(self.scheduler, scheduled.num_tokens, seconds)
            elif not scheduled.num_tokens:
                self.runner.connector.wait(WAIT_SECONDS)  # a copy is all there is to do
                self.trace.skip()
            outputs, self.outbox = self.outbox, []
            self.trace.outputs(outputs)
        return outputs

    @phase
    def schedule(self) -> SchedulerOutput:
        """The sequences to run, each with its number of new tokens."""
        self.scheduler.update_connector_output(self.runner.connector.get_finished())
        self.grammars.admit()
        if self.sleep_level:  # nothing begins but copies
            return SchedulerOutput(
                connector_meta=self.connector.build_connector_meta(SchedulerOutput())
            )
        return self.scheduler.schedule()

    @phase
    def prepare(self, scheduled: SchedulerOutput) -> Batch:
        """The step's input, as tensors."""
        return self.runner.prepare(scheduled)

    @phase
    def launch(self, batch: Batch) -> Work:
        """Give the device the forward and the sampling, to be done after all before it."""
        return self.runner.launch(batch)

    @phase
    def wait(self, pending: PendingStep) -> Sampled:
        """The next tokens of each sampled sequence, when the device has them; and the scores of
        prompts that ask for them."""
        sampled = pending.work.result()
        begin, end = pending.work.times()
        self.trace.device(pending.number, begin, end)
        self.connector.observe_step(pending.scheduled.num_tokens, end - begin)
        return sampled

    @phase
    def postprocess(self, scheduled: SchedulerOutput, sampled: Sampled) -> None:
        """Drop rejected drafts; publish what was computed; append the tokens; release the
        sequences that end.

        Tokens of a sequence that has ended since the launch are dropped.
        """
        add_prompt_logprobs(scheduled.num_new_tokens, sampled.prompts)
        token_ids, logprobs = sampled.lists()
        self.speculator.settle(scheduled.sampled, token_ids)
        self.scheduler.publish(scheduled, [later.scheduled for later in self.in_flight])
        for sequence, new, scored in zip(scheduled.sampled, token_ids, logprobs, strict=True):
            if sequence.status is not Status.FINISHED:
                reason = sequence.extend(new)
                if reason is not None:
                    self.finish(sequence)
                del scored[len(new) :]
                error = self.grammars.error_of(sequence) if reason == "error" else None
                self.emit(sequence, new, scored, reason, error)

    def emit(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs | None],
        finish_reason: str | None,
        error: str | None = None,
    ) -> None:
        """Put what is new of a sequence into the outbox."""
        output = RequestOutput(sequence.request_id, token_ids, logprobs, finish_reason)
        if len(sequence.output_token_ids) <= len(token_ids):  # once: they may be megabytes
            output.prompt_logprobs = sequence.prompt_logprobs
        output.num_cached_tokens = sequence.num_cached_tokens or 0
        output.draft_counts, output.error = sequence.draft_counts, error
        self.outbox.append(output)

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence; what it holds is free."""
        if not self.grammars.forget(sequence):
            self.scheduler.finish(sequence)
        self.speculator.forget(sequence)
        del self.sequences[sequence.request_id]

    def fail_step(self) -> None:
        """After an exception in `step`: end the sequences of what failed, which was being launched
        or read, with `error`. The others go on, and so does the other step in flight.
        """
        failed = self.scheduled.num_new_tokens if self.scheduled else self.scheduler.running
        for sequence in list(failed):
            if sequence.status is not Status.FINISHED:
                self.abort(sequence.request_id, "error")

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do, to read or to return."""
        has_work = bool(self.sequences) and not self.sleep_level
        has_work = has_work or bool(self.outbox) or bool(self.in_flight)
        return has_work or self.connector.is_busy

    def sleep(self, level: int = 1) -> dict[str, Any]:
        """Give back the memory of the KV cache and of the weights, which are kept in a file, or of a GPU
        in the host's memory (level 1), or nowhere (2). Requests wait until `wake_up`.

        Returns what it took, and gave. Raises ValueError, of which SleepError leaves all as it was.
        """
        return fall_asleep(self, level)

    def wake_up(self) -> dict[str, Any]:
        """Have the memory again, with the same weights in it. Raises SleepError; then it sleeps on."""
        return wake_up(self)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held in memory, in bytes."""
        return {
            "num_running": len(self.scheduler.running) + len(self.scheduler.ending),
            "num_waiting": len(self.scheduler.waiting) + len(self.grammars.waiting),
            "num_loading": len(self.scheduler.loading),
            "num_preemptions": self.scheduler.num_preemptions,
            "num_recomputed_tokens": self.scheduler.num_recomputed_tokens,
            "sleep_level": self.sleep_level,
            "weight_bytes": self.runner.num_weight_bytes,
            "kv_cache_bytes": self.kv.num_bytes,
            "buffer_bytes": self.runner.num_buffer_bytes,
            "rank_bytes": [held.tolist() for held in self.runner.rank_bytes],
            "num_bytes_sent": self.runner.ranks.stages.num_bytes_sent,
            "block_size": self.kv.block_size,
            "num_blocks": self.kv.num_blocks,
            "num_used_blocks": self.kv.num_blocks - self.scheduler.cache.num_free,
            "num_prefix_cache_queries": self.scheduler.num_cache_queries,
            "num_prefix_cache_hits": self.scheduler.num_cache_hits,
            **self.connector.stats(),
            **self.speculator.stats(),
            **self.runner.graphs.stats(),
            **self.runner.expert_stats(),
        }

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        scheduler = self.scheduler
        known = [*scheduler.running, *scheduler.waiting, *scheduler.loading, *scheduler.ending]
        known += self.grammars.waiting
        assert len(known) == len(self.sequences), f"{len(known)} of {len(self.sequences)} queued"
        for sequence in known:
            assert self.sequences.get(sequence.request_id) is sequence, sequence.request_id
            expected = sum(sequence in pending.scheduled.sampled for pending in self.in_flight)
            assert sequence.num_placeholders == expected, f"{sequence.request_id}: {expected}"
        self.scheduler.check_integrity()

    def drop_requests(self) -> None:
        """End every request, and what the next steps would return."""
        for request_id in list(self.sequences):
            self.abort(request_id)
        self.outbox.clear()
        self.drain()

    def drain(self) -> None:
        """Wait for the steps in flight, and drop what they give; and for transfers."""
        while self.in_flight:
            self.in_flight.popleft().work.wait()
        self.connector.drop()
        while self.connector.is_busy:
            self.runner.transfer(self.connector.build_connector_meta(SchedulerOutput()))
            self.runner.connector.wait(WAIT_SECONDS)
            self.scheduler.update_connector_output(self.runner.connector.get_finished())

    def problem(self) -> str | None:
        """Which rank is lost, or None while all live."""
        return self.runner.ranks.problem()

    def shutdown(self) -> None:
        """Drop every request, and end the other ranks. The engine is not to be used after."""
        self.drop_requests()
        self.runner.queue.close()
        self.runner.masks.close()
        self.runner.connector.shutdown()
        self.runner.ranks.close()
