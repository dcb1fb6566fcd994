"""The engine: the step that asks the scheduler who runs, runs them, and gives each its new tokens.

Sequences join and leave between steps. A step is one forward over the new tokens of all of them.
The next step is scheduled and launched before the tokens of the last one are read, so that the
device need not wait for the host. With speculation it is not: what is drafted depends on them.

Work is cut into steps so that whoever drives the engine can add and abort requests in between.
"""

import itertools
import random
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from common.completions import Completion, OutputProcessor, TokenLogprobs
from common.models.checkpoint import eos_token_ids, load_config, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.prompt_logprobs import PromptPiece
from common.prompts import ParamsForPrompts, Prompts, check_prompt, prepare_prompts
from common.sampling import MAX_N, NO_TOKEN, SamplingParams
from common.trace import Trace, phase

from .config import EngineConfig
from .device_queue import Work
from .model_runner import Batch, ModelRunner
from .scheduler import Scheduler, SchedulerOutput
from .sequence import RequestOutput, Sequence
from .speculator import make_speculator


@dataclass(frozen=True)
class PendingStep:
    """A step that was launched and whose tokens are not read yet."""

    number: int  # in the trace
    scheduled: SchedulerOutput
    sampled: list[Sequence]
    prompts: list[tuple[Sequence, PromptPiece]]
    work: Work


class LLMEngine:
    """Many sequences at a time, first come, first served. Not safe from several threads."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model. Raises ValueError when it cannot be had."""
        folder = resolve(config.model)
        self.tokenizer = Tokenizer.load(folder)
        self.runner = ModelRunner(config, folder)
        self.eos_token_ids = eos_token_ids(folder, load_config(folder))
        self.sampling_defaults = sampling_defaults(folder, config.generation_config)
        self.config = self.runner.config  # with what depends on the device
        self.vocab_size = self.runner.model.config.vocab_size
        self.kv, self.max_model_len = self.runner.kv, self.runner.max_model_len
        self.seeds = random.Random(config.seed)  # for requests that bring none
        self.sequences: dict[str, Sequence] = {}  # by request id, until they finish
        self.aborted: list[RequestOutput] = []  # last outputs that the next step returns
        self.trace = Trace(num_blocks=self.kv.num_blocks, block_size=self.kv.block_size)
        self.scheduler = Scheduler(self.config, self.kv, self.trace)
        self.in_flight: deque[PendingStep] = deque()
        self.speculator = make_speculator(self.config, self.runner)
        is_async = self.config.async_scheduling and self.speculator is None
        self.num_in_flight = 2 if is_async else 1  # when the first is read
        self.scheduled: SchedulerOutput | None = None  # what is being launched or read

    def generate(
        self,
        prompts: Prompts,
        sampling_params: ParamsForPrompts = None,
        progress: bool = True,
        cache_salt: str | None = None,
        may_draft: bool = True,
    ) -> list[Completion]:
        """Complete each prompt, text or token ids, `n` times. Raises ValueError before any work."""
        requests = prepare_prompts(self, prompts, sampling_params, MAX_N, prompt_logprobs=True)
        if self.has_unfinished():
            raise ValueError("generate needs an engine that has no requests of add_request")
        outputs: dict[str, OutputProcessor] = {}
        for prompt, params in requests:
            for choice in range(params.n):
                request_id = f"generate-{len(outputs)}"
                outputs[request_id] = OutputProcessor(self.tokenizer, params, prompt)
                one = params.for_choice(choice)
                self.add_request(request_id, prompt, one, choice, cache_salt, may_draft)
        try:
            with tqdm(total=len(outputs), desc="Completions", disable=not progress) as bar:
                while not all(output.finished for output in outputs.values()):
                    for step_output in self.step():
                        output = outputs[step_output.request_id]
                        was_finished = output.finished
                        output.process(
                            step_output.token_ids,
                            step_output.finish_reason,
                            step_output.logprobs,
                            step_output.num_cached_tokens,
                            step_output.draft_counts,
                            step_output.prompt_logprobs,
                        )
                        if output.finished and not was_finished:
                            self.abort(step_output.request_id)  # ended by a stop string, perhaps
                            bar.update()
        finally:
            for request_id in outputs:
                self.abort(request_id)
            self.aborted.clear()
            self.drain()
        return [output.completion(index) for index, output in enumerate(outputs.values())]

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        choice: int = 0,
        cache_salt: str | None = None,
        may_draft: bool = True,
    ) -> None:
        """Put a request at the end of the queue. Raises ValueError when it cannot be run.

        choice: which of the n completions of its prompt it is; they differ in their noise.
        cache_salt: keys and values are shared only with requests of the same salt.
        may_draft: whether tokens may be speculated on; it changes nothing but speed, and, for
            requests without a seed, which of the equally right draws is made.
        """
        if request_id in self.sequences:
            raise ValueError(f"request_id {request_id!r} is in use")
        check_prompt(prompt_token_ids, sampling_params, self.max_model_len, self.vocab_size)
        seed = sampling_params.seed
        seed = self.seeds.getrandbits(64) if seed is None else seed
        endings = sampling_params.ending_token_ids(self.eos_token_ids)
        limit = len(prompt_token_ids) + (sampling_params.max_tokens or self.max_model_len)
        limit = min(limit, self.max_model_len)
        may_draft = may_draft and not sampling_params.has_penalties  # they change with every token
        about = (seed, endings, choice, limit, cache_salt, may_draft)
        sequence = Sequence(request_id, prompt_token_ids, sampling_params, *about)
        self.sequences[request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """End a request; the next step returns its last output. Unknown ids are finished ones."""
        if request_id in self.sequences:
            sequence = self.sequences[request_id]
            self.finish(sequence)
            self.aborted.append(self.output(sequence, reason))

    def step(self) -> list[RequestOutput]:
        """Launch more tokens of each sequence; then read what was launched before.

        Returns what is new, at times nothing.
        """
        outputs = []
        with self.trace.step() as record:
            self.scheduled = None
            self.scheduled = scheduled = self.schedule()
            if scheduled.num_new_tokens:
                batch = self.prepare(scheduled)
                work = self.launch(batch)
                self.scheduler.launched(scheduled.num_new_tokens, batch.sampled)
                about = (batch.sampled, batch.prompts, work)
                self.in_flight.append(PendingStep(record.step, scheduled, *about))
            is_full = len(self.in_flight) == self.num_in_flight
            if self.in_flight and (is_full or not scheduled.num_new_tokens):
                pending = self.in_flight.popleft()
                self.scheduled = pending.scheduled
                outputs += self.postprocess(pending, *self.wait(pending))
                if self.speculator is not None:
                    # Kept where they are safe: drafting may fail.
                    self.aborted, outputs = [*self.aborted, *outputs], []
                    seconds = time.perf_counter() - record.begin
                    self.speculator.ran(pending.scheduled.num_tokens, seconds)
                    self.propose()
            outputs, self.aborted = [*self.aborted, *outputs], []
            for output in outputs:
                if output.finish_reason is not None:
                    self.trace.finished(output.request_id, output.finish_reason)
        return outputs

    @phase
    def schedule(self) -> SchedulerOutput:
        """Who runs, each with its number of new tokens."""
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
    def wait(
        self, pending: PendingStep
    ) -> tuple[list[list[int]], list[list[TokenLogprobs | None]]]:
        """The next tokens of each sampled sequence, when the device has them."""
        sampled = pending.work.result()
        self.trace.device(pending.number, *pending.work.times())
        for (sequence, piece), found in zip(pending.prompts, sampled.prompts, strict=True):
            sequence.prompt_logprobs = piece.added(sequence.prompt_logprobs, found)
        return sampled.lists()

    @phase
    def postprocess(
        self,
        pending: PendingStep,
        token_ids: list[list[int]],
        logprobs: list[list[TokenLogprobs | None]],
    ) -> list[RequestOutput]:
        """Let others find what was computed; append the tokens; let the sequences go that end.

        Tokens of a sequence that has ended since the launch are dropped.
        """
        for sequence, drawn in zip(pending.sampled, token_ids, strict=True):
            if self.is_alive(sequence):
                self.accept(sequence, drawn)
        self.scheduler.computed(pending.scheduled, [later.scheduled for later in self.in_flight])
        rows = zip(pending.sampled, token_ids, logprobs, strict=True)
        return [self.append(*row) for row in rows if self.is_alive(row[0])]

    def accept(self, sequence: Sequence, token_ids: list[int]) -> None:
        """Count which drafts of a sequence stayed. What was computed for the others is as if it had
        never been: the tokens that come instead are computed in their place."""
        num_drafts, num_accepted = len(sequence.draft_token_ids), len(token_ids) - 1
        sequence.num_computed_tokens -= num_drafts - num_accepted
        sequence.num_drafted_kv = min(sequence.num_drafted_kv, sequence.num_computed_tokens)
        sequence.draft_counts = sequence.draft_counts.plus(num_drafts, num_accepted)
        if num_drafts > num_accepted:
            self.trace.rejected(sequence.request_id, num_drafts - num_accepted)
        if self.speculator is not None:
            self.speculator.verified(sequence, token_ids)

    @phase
    def propose(self) -> None:
        """Drafts for the next step."""
        assert self.speculator is not None
        self.speculator.propose(self.scheduler)

    def is_alive(self, sequence: Sequence) -> bool:
        """Whether it has not ended; its id may be another request's by now."""
        return self.sequences.get(sequence.request_id) is sequence

    def append(
        self, sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs | None]
    ) -> RequestOutput:
        """Add new tokens to a sequence, up to the one that ends it."""
        reason, num_taken = None, 0
        sequence.num_placeholders -= 1
        while reason is None and num_taken < len(token_ids):
            sequence.output_token_ids.append(token_ids[num_taken])
            num_taken += 1
            reason = self.finish_reason(sequence)
        if reason is not None:
            self.finish(sequence)
        return self.output(sequence, reason, token_ids[:num_taken], logprobs[:num_taken])

    def output(
        self,
        sequence: Sequence,
        finish_reason: str | None,
        token_ids: list[int] | None = None,
        logprobs: list[TokenLogprobs | None] | None = None,
    ) -> RequestOutput:
        """What a step, or an abort, says of a sequence."""
        return RequestOutput(
            sequence.request_id,
            token_ids or [],
            logprobs or [],
            finish_reason,
            sequence.prompt_logprobs,
            num_cached_tokens=sequence.num_cached_tokens or 0,
            draft_counts=sequence.draft_counts,
        )

    def finish_reason(self, sequence: Sequence) -> str | None:
        """Why a sequence ends with its last token: `stop`, `length` or `error`; None: it goes on."""
        token_id = sequence.output_token_ids[-1]
        if token_id == NO_TOKEN:
            return "error"
        if token_id in sequence.ending_token_ids:
            return "stop"
        return "length" if sequence.num_known_tokens == sequence.limit else None

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence; what it holds is free."""
        self.scheduler.finish(sequence)
        if self.speculator is not None:
            self.speculator.forget(sequence)
        del self.sequences[sequence.request_id]

    def fail_step(self) -> None:
        """After an exception in `step`: end the sequences of what failed, which was being launched
        or read, with `error`. The others go on, and so does the other step in flight.
        """
        failed = self.scheduled.num_new_tokens if self.scheduled else self.scheduler.running
        for sequence in list(failed):
            if self.is_alive(sequence):
                self.abort(sequence.request_id, "error")

    def drain(self) -> None:
        """Wait for the steps in flight and drop what they give."""
        while self.in_flight:
            self.in_flight.popleft().work.wait()

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do, to read or to return."""
        return bool(self.sequences) or bool(self.aborted) or bool(self.in_flight)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held in memory, in bytes."""
        return {
            "num_running": len(self.scheduler.running) + len(self.scheduler.leaving),
            "num_waiting": len(self.scheduler.waiting),
            "num_preemptions": self.scheduler.num_preemptions,
            "weight_bytes": self.runner.num_weight_bytes,
            "kv_cache_bytes": self.runner.num_kv_bytes,
            "buffer_bytes": self.runner.num_buffer_bytes,
            "block_size": self.kv.block_size,
            "num_blocks": self.kv.num_blocks,
            "num_used_blocks": self.kv.num_blocks - self.scheduler.cache.num_free,
            "num_prefix_cache_queries": self.scheduler.num_cache_queries,
            "num_prefix_cache_hits": self.scheduler.num_cache_hits,
            **({} if self.speculator is None else self.speculator.stats()),
        }

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        queues = self.scheduler.running, self.scheduler.waiting, self.scheduler.leaving
        known = list(itertools.chain(*queues))
        assert len(known) == len(self.sequences), f"{len(known)} of {len(self.sequences)} queued"
        for sequence in known:
            assert self.is_alive(sequence), sequence.request_id
            in_flight = sum(sequence in pending.sampled for pending in self.in_flight)
            assert sequence.num_placeholders == in_flight, f"{sequence.request_id}: {in_flight}"
        self.scheduler.check_integrity()

    def shutdown(self) -> None:
        """Drop every request. The engine is not to be used after."""
        for request_id in list(self.sequences):
            self.abort(request_id)
        self.aborted.clear()
        self.drain()
