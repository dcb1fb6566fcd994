"""The engine: a model, its KV cache, and the loop that asks for one token after another.

Prefill runs the whole prompt at once and is limited by arithmetic; decode runs one token against
the cached keys and values of all before it and is limited by reading the weights from memory.
"""

import random

import torch
from tqdm import tqdm
from transformers import DynamicCache

from common.completions import Completion, OutputProcessor, RequestOutput
from common.device import resolve_device, usable_cores
from common.models.checkpoint import context_length, eos_token_ids, load_transformers_model, resolve
from common.models.generation_config import sampling_defaults
from common.models.tokenizer import Tokenizer
from common.models.transformers_names import cache_argument
from common.requests import ParamsForPrompts, Prompts, Request, make_requests
from common.sampling import NO_TOKEN, SamplingBatch

from .config import EngineConfig
from .sampler import sample


class LLMEngine:
    """One sequence at a time, from prompt to completion. Not safe from several threads."""

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

    def generate(
        self, prompts: Prompts, sampling_params: ParamsForPrompts = None, progress: bool = True
    ) -> list[Completion]:
        """Complete each prompt, text or token ids. Raises ValueError before any work is done."""
        requests = make_requests(self, prompts, sampling_params)
        bar = tqdm(requests, desc="Completions", disable=not progress)
        return [self.complete(request).completion(index) for index, request in enumerate(bar)]

    @torch.inference_mode()
    def complete(self, request: Request) -> OutputProcessor:
        """Prefill, then decode until something ends the output."""
        prompt, params = request.prompt_token_ids, request.params
        output = OutputProcessor(self.tokenizer, params, prompt)
        seed = self.seeds.getrandbits(64) if params.seed is None else params.seed
        endings = params.ending_token_ids(self.eos_token_ids)
        logits, cache = self.prefill(prompt)
        while True:
            row = [params], [seed], [len(prompt)], [output.token_ids], [endings]
            [token_id], logprobs = sample(logits, SamplingBatch.build(logits, *row))
            reason = self.finish_reason(request, [*output.token_ids, token_id])
            output.process(RequestOutput(request.request_id, [token_id], logprobs, reason))
            if output.finished:
                return output
            if not self.config.kv_cache:
                logits, cache = self.prefill(prompt + output.token_ids)
            else:
                logits = self.decode(token_id, cache)

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

    def finish_reason(self, request: Request, token_ids: list[int]) -> str | None:
        """Why output ends with its last token: `stop`, `length` or `error`; None: it goes on."""
        if token_ids[-1] == NO_TOKEN:
            return "error"
        if token_ids[-1] in request.params.ending_token_ids(self.eos_token_ids):
            return "stop"
        num_tokens = len(request.prompt_token_ids) + len(token_ids)
        return "length" if num_tokens == request.limit(self.max_model_len) else None
