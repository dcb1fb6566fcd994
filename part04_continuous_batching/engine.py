"""The engine: the step that asks the scheduler who runs, runs them, and gives each its new tokens.

Sequences join and leave between steps. A step is one forward over the new tokens of all of them.

Work is cut into steps so that whoever drives the engine can add and abort requests in between.
"""

import random
from typing import Any

import torch
from tqdm import tqdm

from common.completions import Completion, OutputProcessor, TokenLogprobs
from common.models.checkpoint import eos_token_ids, load_config, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.prompt_logprobs import PromptScores
from common.prompts import ParamsForPrompts, Prompts, check_prompt, prepare_prompts
from common.sampling import MAX_N, NO_TOKEN, SamplingParams
from common.trace import Trace, phase

from .config import EngineConfig
from .model_runner import Batch, ModelRunner
from .scheduler import Scheduler, SchedulerOutput
from .sequence import RequestOutput, Sequence


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
        self.scheduled: SchedulerOutput | None = None  # what the step runs

    def generate(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None, progress: bool = True
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
                self.add_request(request_id, prompt, params.for_choice(choice), choice)
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
                            prompt_logprobs=step_output.prompt_logprobs,
                        )
                        if output.finished and not was_finished:
                            self.abort(step_output.request_id)  # ended by a stop string, perhaps
                            bar.update()
        finally:
            for request_id in outputs:
                self.abort(request_id)
            self.aborted.clear()
        return [output.completion(index) for index, output in enumerate(outputs.values())]

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: list[int],
        sampling_params: SamplingParams,
        choice: int = 0,
    ) -> None:
        """Put a request at the end of the queue. Raises ValueError when it cannot be run.

        choice: which of the n completions of its prompt it is; they differ in their noise.
        """
        if request_id in self.sequences:
            raise ValueError(f"request_id {request_id!r} is in use")
        check_prompt(prompt_token_ids, sampling_params, self.max_model_len, self.vocab_size)
        seed = sampling_params.seed
        seed = self.seeds.getrandbits(64) if seed is None else seed
        endings = sampling_params.ending_token_ids(self.eos_token_ids)
        sequence = Sequence(request_id, prompt_token_ids, sampling_params, seed, endings, choice)
        self.sequences[request_id] = sequence
        self.scheduler.add(sequence)

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """End a request; the next step returns its last output. Unknown ids are finished ones."""
        if request_id in self.sequences:
            self.finish(self.sequences[request_id])
            self.aborted.append(RequestOutput(request_id, [], finish_reason=reason))

    def step(self) -> list[RequestOutput]:
        """Run prompts, or one more token of each sequence. Returns what is new, at times nothing."""
        outputs = []
        with self.trace.step():
            self.scheduled = None
            self.scheduled = scheduled = self.schedule()
            if scheduled.num_new_tokens:
                batch = self.prepare(scheduled)
                logits, scores = self.forward(batch)
                token_ids, logprobs = self.sample(batch, logits)
                outputs += self.postprocess(scheduled, batch, token_ids, logprobs, scores)
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
    def forward(self, batch: Batch) -> tuple[torch.Tensor, list[PromptScores]]:
        """Logits after each sampled sequence's last token, [num_sampled, vocab]; and the scores of
        prompts that ask for them."""
        return self.runner.forward(batch)

    @phase
    def sample(
        self, batch: Batch, logits: torch.Tensor
    ) -> tuple[list[list[int]], list[list[TokenLogprobs | None]]]:
        """The next tokens of each sampled sequence."""
        return self.runner.sample(batch, logits)

    @phase
    def postprocess(
        self,
        scheduled: SchedulerOutput,
        batch: Batch,
        token_ids: list[list[int]],
        logprobs: list[list[TokenLogprobs | None]],
        scores: list[PromptScores],
    ) -> list[RequestOutput]:
        """Append the tokens; let the sequences go that end with theirs."""
        for (sequence, piece), found in zip(batch.prompts, scores, strict=True):
            sequence.prompt_logprobs = piece.added(sequence.prompt_logprobs, found)
        for sequence, count in scheduled.num_new_tokens.items():
            sequence.num_computed_tokens += count
        rows = zip(batch.sampled, token_ids, logprobs, strict=True)
        return [self.append(*row) for row in rows]

    def append(
        self, sequence: Sequence, token_ids: list[int], logprobs: list[TokenLogprobs | None]
    ) -> RequestOutput:
        """Add new tokens to a sequence, up to the one that ends it."""
        reason, num_taken = None, 0
        while reason is None and num_taken < len(token_ids):
            sequence.output_token_ids.append(token_ids[num_taken])
            num_taken += 1
            reason = self.finish_reason(sequence)
        if reason is not None:
            self.finish(sequence)
        new = token_ids[:num_taken], logprobs[:num_taken]
        return RequestOutput(sequence.request_id, *new, reason, sequence.prompt_logprobs)

    def finish_reason(self, sequence: Sequence) -> str | None:
        """Why a sequence ends with its last token: `stop`, `length` or `error`; None: it goes on."""
        token_id = sequence.output_token_ids[-1]
        if token_id == NO_TOKEN:
            return "error"
        if token_id in sequence.ending_token_ids:
            return "stop"
        at_limit = sequence.num_tokens >= self.max_model_len
        is_last = len(sequence.output_token_ids) == sequence.params.max_tokens
        return "length" if at_limit or is_last else None

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence; what it holds is free."""
        self.scheduler.finish(sequence)
        del self.sequences[sequence.request_id]

    def fail_step(self) -> None:
        """After an exception in `step`: end the sequences it ran with `error`. The others go on."""
        failed = self.scheduled.num_new_tokens if self.scheduled else self.scheduler.running
        for sequence in list(failed):
            self.abort(sequence.request_id, "error")

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self.sequences) or bool(self.aborted)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held in memory, in bytes."""
        return {
            "num_running": len(self.scheduler.running),
            "num_waiting": len(self.scheduler.waiting),
            "num_preemptions": self.scheduler.num_preemptions,
            "weight_bytes": self.runner.model.num_bytes,
            "kv_cache_bytes": self.kv.data.nbytes,
            "buffer_bytes": self.runner.num_buffer_bytes,
            "block_size": self.kv.block_size,
            "num_blocks": self.kv.num_blocks,
            "num_used_blocks": self.kv.num_blocks - self.kv.pool.num_free,
        }

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        known = [*self.scheduler.running, *self.scheduler.waiting]
        assert len(known) == len(self.sequences), f"{len(known)} of {len(self.sequences)} queued"
        for sequence in known:
            assert self.sequences[sequence.request_id] is sequence, sequence.request_id
        self.scheduler.check_integrity()

    def shutdown(self) -> None:
        """Drop every request. The engine is not to be used after."""
        for request_id in list(self.sequences):
            self.abort(request_id)
        self.aborted.clear()
