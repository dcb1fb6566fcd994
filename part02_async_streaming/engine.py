"""The engine: a model, its KV cache, and the step that asks for one token after another.

Prefill runs the whole prompt at once and is limited by arithmetic; decode runs one token against
the cached keys and values of all before it and is limited by reading the weights from memory.

Work is cut into steps, so that requests can be added and aborted in between.
"""

import random
from collections import deque
from typing import Any

import torch
from transformers import DynamicCache

from common.completions import Completion, RequestOutput, TokenLogprobs, run_to_completion
from common.device import resolve_device, usable_cores
from common.models.checkpoint import context_length, eos_token_ids, load_transformers_model, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.models.transformers_names import cache_argument
from common.requests import ParamsForPrompts, Prompts, Request, check_request, make_requests
from common.sampling import NO_TOKEN, SamplingBatch
from common.trace import Trace, phase

from .config import EngineConfig
from .sampler import sample
from .sequence import Sequence


class LLMEngine:
    """One sequence at a time, first come, first served. Not safe from several threads."""

    def __init__(self, config: EngineConfig) -> None:
        """Load the model. Raises ValueError when it cannot be had."""
        self.config = config
        self.device, dtype = resolve_device(config.device, config.dtype)
        torch.set_num_threads(config.threads or usable_cores())
        folder = resolve(config.model)
        self.tokenizer = Tokenizer.load(folder)
        self.model = load_transformers_model(folder, dtype, self.device)
        self.eos_token_ids = eos_token_ids(folder, self.model.config)
        self.sampling_defaults = sampling_defaults(folder, config.generation_config)
        self.vocab_size = self.model.config.vocab_size
        self.max_model_len = context_length(self.model.config, config.max_model_len)
        self.seeds = random.Random(config.seed)  # for requests that bring none
        self.sequences: dict[str, Sequence] = {}  # by request id, until they finish
        self.outbox: list[RequestOutput] = []  # what the next step returns
        self.waiting: deque[Sequence] = deque()
        self.running: Sequence | None = None
        self.trace = Trace()

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
        """Run the first request for one token. Returns what is new, at times nothing."""
        with self.trace.step():
            sequence = self.schedule()
            if sequence is not None:
                token_ids = self.prepare(sequence)
                logits = self.forward(sequence, token_ids)
                token_id, logprobs = self.sample(sequence, logits)
                self.postprocess(sequence, token_id, logprobs)
            outputs, self.outbox = self.outbox, []
            self.trace.outputs(outputs)
        return outputs

    @phase
    def schedule(self) -> Sequence | None:
        """The sequence to run: the one under way, else the next in the queue."""
        if self.running is None and self.waiting:
            self.running = self.waiting.popleft()
        return self.running

    @phase
    def prepare(self, sequence: Sequence) -> list[int]:
        """The tokens to run: all of them before there is a cache, then the last one."""
        if not self.config.kv_cache:
            sequence.cache = None
        token_ids = sequence.output_token_ids[-1:]
        if sequence.cache is None:
            token_ids = sequence.prompt_token_ids + sequence.output_token_ids
        self.trace.scheduled(sequence.request_id, len(token_ids))
        return token_ids

    @phase
    @torch.inference_mode()
    def forward(self, sequence: Sequence, token_ids: list[int]) -> torch.Tensor:
        """Logits of the last token, [1, vocab]."""
        if sequence.cache is None:
            logits, sequence.cache = self.prefill(token_ids)
            return logits
        return self.decode(token_ids[-1], sequence.cache)

    def prefill(self, token_ids: list[int]) -> tuple[torch.Tensor, DynamicCache]:
        """Run a whole prompt; returns the last position's logits, [1, vocab], and its KV cache."""
        cache = DynamicCache(config=self.model.config)
        return self.run_model(token_ids, cache), cache

    def decode(self, token_id: int, cache: DynamicCache) -> torch.Tensor:
        """Run one more token against the cache, which grows by it; returns logits, [1, vocab]."""
        return self.run_model([token_id], cache)

    def run_model(self, token_ids: list[int], cache: DynamicCache) -> torch.Tensor:
        input_ids = torch.tensor([token_ids], device=self.device)
        cache_kwargs = {cache_argument(self.model): cache}
        output = self.model(input_ids, **cache_kwargs, use_cache=True, logits_to_keep=1)
        return output.logits[:, -1]

    @phase
    def sample(
        self, sequence: Sequence, logits: torch.Tensor
    ) -> tuple[int, list[TokenLogprobs | None]]:
        """The next token."""
        batch = SamplingBatch.build(
            logits,
            [sequence.params],
            [sequence.seed],
            [len(sequence.prompt_token_ids)],
            [sequence.output_token_ids],
            [sequence.ending_token_ids],
        )
        [token_id], logprobs = sample(logits, batch)
        return token_id, logprobs

    @phase
    def postprocess(
        self, sequence: Sequence, token_id: int, logprobs: list[TokenLogprobs | None]
    ) -> None:
        """Append the token; release the sequence when it ends."""
        sequence.output_token_ids.append(token_id)
        reason = self.finish_reason(sequence)
        if reason is not None:
            self.finish(sequence)
        self.emit(sequence, [token_id], logprobs, reason)

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
        """Forget a sequence and its KV cache."""
        if sequence is self.running:
            self.running = None
        else:
            self.waiting.remove(sequence)
        sequence.cache = None
        del self.sequences[sequence.request_id]

    def fail_step(self) -> None:
        """After an exception in `step`: end the sequence it ran with `error`. The engine goes on."""
        if self.running is not None:
            self.abort(self.running.request_id, "error")

    def has_unfinished(self) -> bool:
        """Whether a step has anything to do or to return."""
        return bool(self.sequences) or bool(self.outbox)

    def stats(self) -> dict[str, Any]:
        """Counts, and what is held in memory, in bytes."""
        cache = self.running.cache if self.running else None
        layers = cache.layers if cache is not None else []
        tensors = [tensor for layer in layers for tensor in (layer.keys, layer.values)]
        return {
            "num_running": int(self.running is not None),
            "num_waiting": len(self.waiting),
            "weight_bytes": sum(p.nbytes for p in self.model.parameters()),
            "kv_cache_bytes": sum(t.nbytes for t in tensors if t is not None),
        }

    def check_integrity(self) -> None:
        """Assert what must hold between steps."""
        known = [*([self.running] if self.running else []), *self.waiting]
        assert len(known) == len(self.sequences), f"{len(known)} of {len(self.sequences)} queued"
        for sequence in known:
            assert self.sequences[sequence.request_id] is sequence, sequence.request_id
        for sequence in self.waiting:
            assert sequence.cache is None, f"{sequence.request_id} waits and has a cache"
        if self.running is not None and self.running.cache is not None:
            cached = self.running.cache.get_seq_length()
            total = self.running.num_tokens
            assert cached == total - 1, f"{cached} tokens cached of {total}, not all but the last"

    def drop_requests(self) -> None:
        """End every request, and what the next step would return."""
        for request_id in list(self.sequences):
            self.abort(request_id)
        self.outbox.clear()

    def shutdown(self) -> None:
        """Drop every request. The engine is not to be used after."""
        self.drop_requests()
