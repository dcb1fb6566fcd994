"""The engine: a queue, a static batch of sequences, and the step that gives each one more token.

The KV cache is one pool of blocks. As many waiting requests as the pool can hold to their very end
form a batch; each reserves its blocks, and the batch runs until its last sequence has finished. A
sequence that ends sooner stays where it is, computed and ignored.

Work is cut into steps, so that requests can be added and aborted in between.
"""

import random
from collections import deque
from typing import Any

import torch

from common.completions import Completion, RequestOutput, TokenLogprobs, run_to_completion
from common.models.checkpoint import eos_token_ids, load_config, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.requests import ParamsForPrompts, Prompts, Request, check_request, make_requests
from common.sampling import NO_TOKEN
from common.trace import Trace, phase

from .config import EngineConfig
from .model_runner import Batch, ModelRunner
from .sequence import Sequence


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
        self.sequences: dict[str, Sequence] = {}  # by request id, until they finish
        self.outbox: list[RequestOutput] = []  # what the next step returns
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the batch, finished sequences among them
        self.trace = Trace(num_blocks=self.kv.num_blocks, block_size=self.kv.block_size)

    def generate(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None, progress: bool = True
    ) -> list[Completion]:
        """Complete each prompt, text or token ids. Raises ValueError before any work is done."""
        requests = make_requests(self, prompts, sampling_params)
        return run_to_completion(self, requests, progress)

    def add_request(self, request: Request) -> None:
        """Put a request at the end of the queue. Raises ValueError when it cannot be run."""
        if request.request_id in self.sequences:
            raise ValueError(f"request_id {request.request_id!r} is in use")
        check_request(request, self.max_model_len, self.vocab_size, prompt_logprobs=False)
        seed = request.params.seed
        sequence = Sequence(
            request,
            seed=self.seeds.getrandbits(64) if seed is None else seed,
            ending_token_ids=request.params.ending_token_ids(self.eos_token_ids),
            limit=request.limit(self.max_model_len),
        )
        self.sequences[request.request_id] = sequence
        self.waiting.append(sequence)
        self.trace.arrived(request.request_id, sequence.num_tokens)

    def abort(self, request_id: str, reason: str = "abort") -> None:
        """End a request; the next step returns its last output. Unknown ids are finished ones."""
        if request_id in self.sequences:
            sequence = self.sequences[request_id]
            self.finish(sequence)
            self.emit(sequence, [], [], reason)

    def step(self) -> list[RequestOutput]:
        """Run the batch for one token each. Returns what is new, at times nothing."""
        with self.trace.step():
            scheduled = self.schedule()
            if scheduled:
                batch = self.prepare(scheduled)
                logits = self.forward(batch)
                token_ids, logprobs = self.sample(scheduled, logits)
                self.postprocess(scheduled, token_ids, logprobs)
            outputs, self.outbox = self.outbox, []
            self.trace.outputs(outputs)
        return outputs

    @phase
    def schedule(self) -> dict[Sequence, int]:
        """The sequences to run, each with its number of new tokens.

        A new batch is formed when the last one is done: from the head of the queue, as many as
        there are blocks for, each to its very end.
        """
        if not self.running:
            while self.waiting and len(self.running) < self.config.max_num_seqs:
                needed = self.kv.blocks_for(self.waiting[0].limit)
                if not self.kv.pool.can_allocate(needed):
                    break
                sequence = self.waiting.popleft()
                sequence.block_table = self.kv.pool.allocate(needed)
                self.trace.allocated(sequence.request_id, sequence.block_table)
                self.running.append(sequence)
        # A finished sequence computes its last token again and again: what a static batch wastes.
        scheduled = {s: s.num_tokens - s.num_computed_tokens for s in self.running}
        for sequence, count in scheduled.items():
            self.trace.scheduled(sequence.request_id, count)
        return scheduled

    @phase
    def prepare(self, scheduled: dict[Sequence, int]) -> Batch:
        """The step's input, as tensors."""
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
    ) -> None:
        """Append the tokens; release the sequences that end."""
        for sequence, token_id, logprob in zip(scheduled, token_ids, logprobs, strict=True):
            if not self.is_alive(sequence):
                continue
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.output_token_ids.append(token_id)
            reason = self.finish_reason(sequence)
            if reason is not None:
                self.finish(sequence)
            self.emit(sequence, [token_id], [logprob], reason)

    def is_alive(self, sequence: Sequence) -> bool:
        """Whether it has not ended; its id may be another request's by now."""
        return self.sequences.get(sequence.request_id) is sequence

    def emit(
        self,
        sequence: Sequence,
        token_ids: list[int],
        logprobs: list[TokenLogprobs | None],
        finish_reason: str | None,
    ) -> None:
        """Put what is new of a sequence into the outbox."""
        self.outbox.append(
            RequestOutput(
                sequence.request_id,
                token_ids,
                logprobs=logprobs,
                finish_reason=finish_reason,
            )
        )

    def finish_reason(self, sequence: Sequence) -> str | None:
        """Why a sequence ends with its last token: `stop`, `length` or `error`; None: it goes on."""
        token_id = sequence.output_token_ids[-1]
        if token_id == NO_TOKEN:
            return "error"
        if token_id in sequence.ending_token_ids:
            return "stop"
        return "length" if sequence.num_tokens == sequence.limit else None

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence. Its batch keeps its blocks until all of it has finished."""
        del self.sequences[sequence.request_id]
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        elif not any(self.is_alive(other) for other in self.running):
            for other in self.running:
                self.kv.pool.free(other.block_table)
                self.trace.freed(other.request_id, other.block_table)
            self.running = []

    def fail_step(self) -> None:
        """After an exception in `step`: end the batch it ran with `error`. The engine goes on."""
        for sequence in [s for s in self.running if self.is_alive(s)]:
            self.abort(sequence.request_id, "error")

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self.sequences) or bool(self.outbox)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held in memory, in bytes."""
        return {
            "num_running": len(self.running),
            "num_waiting": len(self.waiting),
            "weight_bytes": self.runner.model.num_bytes,
            "kv_cache_bytes": self.kv.data.nbytes,
            "block_size": self.kv.block_size,
            "num_blocks": self.kv.num_blocks,
            "num_used_blocks": self.kv.num_blocks - self.kv.pool.num_free,
        }

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        known = [*(s for s in self.running if self.is_alive(s)), *self.waiting]
        assert len(known) == len(self.sequences), f"{len(known)} of {len(self.sequences)} queued"
        for sequence in known:
            assert self.is_alive(sequence), sequence.request_id
        for sequence in self.waiting:
            assert not sequence.block_table, f"{sequence.request_id} waits and has blocks"
        for sequence in self.running:
            room = len(sequence.block_table) * self.kv.block_size
            assert sequence.num_computed_tokens <= room, f"{sequence.request_id} outgrew its blocks"
        self.kv.pool.check_integrity([sequence.block_table for sequence in self.running])

    def drop_requests(self) -> None:
        """End every request, and what the next step would return."""
        for request_id in list(self.sequences):
            self.abort(request_id)
        self.outbox.clear()

    def shutdown(self) -> None:
        """Drop every request. The engine is not to be used after."""
        self.drop_requests()
