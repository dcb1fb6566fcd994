"""The engine: a queue, a static batch of sequences, and the step that gives each one more token.

The KV cache is one pool of blocks. As many waiting requests as the pool can hold to their very end
form a batch; each reserves its blocks, and the batch runs until its last sequence has finished. A
sequence that ends sooner stays where it is, computed and ignored.

Work is cut into steps so that whoever drives the engine can add and abort requests in between.
"""

import random
from collections import deque
from typing import Any

import torch
from tqdm import tqdm

from common.completions import Completion, OutputProcessor, TokenLogprobs
from common.models.checkpoint import eos_token_ids, load_config, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.prompts import ParamsForPrompts, Prompts, check_prompt, prepare_prompts
from common.sampling import NO_TOKEN, SamplingParams
from common.trace import Trace, phase

from .config import EngineConfig
from .model_runner import Batch, ModelRunner
from .sequence import RequestOutput, Sequence


class LLMEngine:
    """A batch of sequences at a time, first come, first served. Not safe from several threads."""

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
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the batch, with those of it that have finished
        self.aborted: list[RequestOutput] = []  # last outputs that the next step returns
        self.trace = Trace(num_blocks=self.kv.num_blocks, block_size=self.kv.block_size)

    def generate(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None, progress: bool = True
    ) -> list[Completion]:
        """Complete each prompt, text or token ids. Raises ValueError before any work is done."""
        requests = prepare_prompts(self, prompts, sampling_params)
        if self.has_unfinished():
            raise ValueError("generate needs an engine that has no requests of add_request")
        outputs: dict[str, OutputProcessor] = {}
        for prompt, params in requests:
            request_id = f"generate-{len(outputs)}"
            outputs[request_id] = OutputProcessor(self.tokenizer, params, prompt)
            self.add_request(request_id, prompt, params)
        try:
            with tqdm(total=len(requests), desc="Completions", disable=not progress) as bar:
                while not all(output.finished for output in outputs.values()):
                    for step_output in self.step():
                        output = outputs[step_output.request_id]
                        was_finished = output.finished
                        output.process(
                            step_output.token_ids, step_output.finish_reason, step_output.logprobs
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
        self, request_id: str, prompt_token_ids: list[int], sampling_params: SamplingParams
    ) -> None:
        """Put a request at the end of the queue. Raises ValueError when it cannot be run."""
        if any(sequence.request_id == request_id for sequence in self.unfinished()):
            raise ValueError(f"request_id {request_id!r} is in use")
        check_prompt(prompt_token_ids, sampling_params, self.max_model_len, self.vocab_size)
        seed = sampling_params.seed
        seed = self.seeds.getrandbits(64) if seed is None else seed
        endings = sampling_params.ending_token_ids(self.eos_token_ids)
        self.trace.arrived(request_id, len(prompt_token_ids))
        self.waiting.append(Sequence(request_id, prompt_token_ids, sampling_params, seed, endings))

    def blocks_needed(self, sequence: Sequence) -> int:
        """Blocks that hold a sequence to its very end."""
        limit = self.max_model_len - len(sequence.prompt_token_ids)
        longest = sequence.params.max_tokens or limit
        return self.kv.blocks_for(len(sequence.prompt_token_ids) + min(longest, limit))

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """End a request; the next step returns its last output. Unknown ids are finished ones."""
        for sequence in self.unfinished():
            if sequence.request_id == request_id:
                self.finish(sequence, reason)
                self.aborted.append(RequestOutput(request_id, [], finish_reason=reason))

    def step(self) -> list[RequestOutput]:
        """Run the batch for one token each. Returns what is new, at times nothing."""
        outputs = []
        with self.trace.step():
            scheduled = self.schedule()
            if scheduled:
                batch = self.prepare(scheduled)
                logits = self.forward(batch)
                token_ids, logprobs = self.sample(scheduled, logits)
                outputs += self.postprocess(scheduled, token_ids, logprobs)
            outputs, self.aborted = [*self.aborted, *outputs], []
            for output in outputs:
                if output.finish_reason is not None:
                    self.trace.finished(output.request_id, output.finish_reason)
        return outputs

    @phase
    def schedule(self) -> dict[Sequence, int]:
        """The sequences to run, each with its number of new tokens.

        A new batch is formed when the last one is done: from the head of the queue, as many as
        there are blocks for.
        """
        while not self.running and self.waiting:
            while self.waiting and len(self.running) < self.config.max_num_seqs:
                needed = self.blocks_needed(self.waiting[0])
                if not self.kv.pool.can_allocate(needed):
                    break
                sequence = self.waiting.popleft()
                sequence.block_table = self.kv.pool.allocate(needed)
                self.trace.allocated(sequence.request_id, sequence.block_table)
                self.running.append(sequence)
        # A finished sequence computes one token again and again: what a static batch wastes.
        return {
            sequence: sequence.num_tokens - sequence.num_computed_tokens
            if sequence.finish_reason is None
            else 1
            for sequence in self.running
        }

    @phase
    def prepare(self, scheduled: dict[Sequence, int]) -> Batch:
        for sequence, count in scheduled.items():
            self.trace.scheduled(sequence.request_id, count)
        return self.runner.prepare(scheduled)

    @phase
    def forward(self, batch: Batch) -> torch.Tensor:
        """Logits after each sequence's last token, [num_seqs, vocab]."""
        return self.runner.forward(batch)

    @phase
    def sample(
        self, scheduled: dict[Sequence, int], logits: torch.Tensor
    ) -> tuple[list[int], list[TokenLogprobs | None]]:
        """The next token of each sequence."""
        return self.runner.sample(list(scheduled), logits)

    @phase
    def postprocess(
        self,
        scheduled: dict[Sequence, int],
        token_ids: list[int],
        logprobs: list[TokenLogprobs | None],
    ) -> list[RequestOutput]:
        """Append the tokens; end the sequences that end with theirs."""
        outputs = []
        for sequence, token_id, logprob in zip(scheduled, token_ids, logprobs, strict=True):
            if sequence.finish_reason is not None:
                continue
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.output_token_ids.append(token_id)
            reason = self.finish_reason(sequence)
            outputs.append(
                RequestOutput(sequence.request_id, [token_id], [logprob], finish_reason=reason)
            )
            if reason is not None:
                self.finish(sequence, reason)
        return outputs

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

    def unfinished(self) -> list[Sequence]:
        return [*(s for s in self.running if s.finish_reason is None), *self.waiting]

    def finish(self, sequence: Sequence, reason: str) -> None:
        """End a sequence. The batch keeps its blocks until all of it has finished."""
        sequence.finish_reason = reason
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        if all(other.finish_reason is not None for other in self.running):
            for other in self.running:
                self.kv.pool.free(other.block_table)
                self.trace.freed(other.request_id, other.block_table)
            self.running = []

    def fail_step(self) -> None:
        """After an exception in `step`: end the batch it ran with `error`. The engine goes on."""
        for sequence in list(self.running):
            self.abort(sequence.request_id, "error")

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self.running) or bool(self.waiting) or bool(self.aborted)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held in memory, in bytes."""
        used = self.kv.num_blocks - self.kv.pool.num_free
        return {
            "num_running": len(self.running),
            "num_waiting": len(self.waiting),
            "weight_bytes": self.runner.model.num_bytes,
            "kv_cache_bytes": self.kv.data.nbytes,
            "num_blocks": self.kv.num_blocks,
            "num_used_blocks": used,
        }

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        ids = [sequence.request_id for sequence in self.unfinished()]
        assert len(ids) == len(set(ids)), f"a request is queued twice: {ids}"
        for sequence in self.waiting:
            assert not sequence.block_table, f"{sequence.request_id} waits and has blocks"
        for sequence in self.running:
            room = len(sequence.block_table) * self.kv.block_size
            assert sequence.num_computed_tokens <= room, f"{sequence.request_id} outgrew its blocks"
        self.kv.pool.check_integrity([sequence.block_table for sequence in self.running])

    def shutdown(self) -> None:
        """Drop every request. The engine is not to be used after."""
        for sequence in [*self.running, *self.waiting]:
            self.abort(sequence.request_id)
        self.aborted.clear()
