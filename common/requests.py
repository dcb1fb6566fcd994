"""Requests: what an engine is asked for, checked before any work.

A server or `generate` builds a `Request`. Everything between them and the code that acts on a field
passes it on unopened, so a new option is one field here and one use there.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from common.kv_transfer.ticket import Ticket
from common.sampling import SamplingParams, shown
from common.structured.grammar import Grammar

Prompt = str | list[int]
Prompts = Prompt | Sequence[Prompt]
ParamsForPrompts = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class Request:
    """One completion of one prompt. `n` of them are n requests.

    choice: which of the n completions of its prompt it is; they differ in their noise.
    cache_salt: keys and values are shared only between requests of the same salt.
    may_draft: whether its tokens may be speculated on. That changes nothing but speed and, for a
        request without a seed, which of the equally right draws is made.
    kv_ticket: where its prompt's keys and values may be computed.
    grammar: what its output must be like.
    """

    request_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    choice: int = 0
    cache_salt: str | None = None
    may_draft: bool = True
    kv_ticket: Ticket | None = None
    grammar: Grammar | None = None

    def limit(self, max_model_len: int) -> int:
        """Tokens that it may have, prompt and output together."""
        longest = len(self.prompt_token_ids) + (self.params.max_tokens or max_model_len)
        return min(longest, max_model_len)


_numbers = itertools.count()
_names = ["request"]  # what the ids of this process begin with


def name_requests(name: str) -> None:
    """Let the ids of requests begin with this, where several processes make requests for one engine."""
    _names[0] = name


def fan_out(
    prompts: Sequence[tuple[list[int], SamplingParams]],
    cache_salt: str | None = None,
    may_draft: bool = True,
    grammar: Grammar | None = None,
) -> list[Request]:
    """A request for each of the `n` completions of each prompt, under ids of their own."""
    return [
        Request(
            f"{_names[0]}-{next(_numbers)}",
            token_ids,
            params.for_choice(choice),
            choice,
            cache_salt,
            may_draft,
            grammar=grammar,
        )
        for token_ids, params in prompts
        for choice in range(params.n)
    ]


def check_request(
    request: Request, max_model_len: int, vocab_size: int, prompt_logprobs: bool = True
) -> None:
    """What `add_request` checks. prompt_logprobs: whether the engine has them. Raises ValueError."""
    if request.params.n != 1:
        raise ValueError(
            f"n is {request.params.n}; a request is for one completion: send n of them"
        )
    check_options(request.params, prompt_logprobs)
    check_prompt(request.prompt_token_ids, request.params, max_model_len, vocab_size)


def check_options(params: SamplingParams, prompt_logprobs: bool) -> None:
    """Raises ValueError for what the engine has not."""
    if params.prompt_logprobs is not None and not prompt_logprobs:
        raise ValueError("prompt_logprobs is not supported by this part; part 04 has it")


def check_prompt(token_ids: list[int], params: SamplingParams, limit: int, vocab: int) -> None:
    """Check a prompt's token ids, and its length with max_tokens against the context.

    limit: the context in tokens; vocab: the model's vocabulary. Raises ValueError.
    """
    if not token_ids:
        raise ValueError("prompt must have at least one token")
    if len(token_ids) >= limit:
        raise ValueError(
            f"prompt has {len(token_ids)} tokens; with a context of {limit} tokens"
            f" it may have at most {limit - 1}"
        )
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < vocab:  # a bool is an int, no id
            raise ValueError(f"prompt has token id {shown(token_id)}; ids go from 0 to {vocab - 1}")
    if params.max_tokens is not None and len(token_ids) + params.max_tokens > limit:
        raise ValueError(
            f"max_tokens is {params.max_tokens}, but a prompt of {len(token_ids)} tokens leaves"
            f" {limit - len(token_ids)} of the context of {limit}"
        )
    for name in ("stop_token_ids", "logit_bias"):
        for token_id in getattr(params, name) or ():
            if token_id >= vocab:
                raise ValueError(f"{name} has {token_id}; ids go from 0 to {vocab - 1}")


def make_requests(
    engine: Any,
    prompts: Prompts,
    sampling_params: ParamsForPrompts,
    max_n: int = 1,
    prompt_logprobs: bool = False,
    **options: Any,
) -> list[Request]:
    """The requests that complete each prompt `n` times, prompt by prompt.

    engine: its `tokenizer`, `max_model_len` and `vocab_size` are the limits. prompts: text or token
    ids, or a list of either. sampling_params: one for all (None: the engine's `sampling_defaults`),
    or one each. max_n, prompt_logprobs: what the engine has. options: other fields of all requests.
    Raises ValueError that names the prompt.
    """
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        prompts = [prompts]
    if sampling_params is None:
        sampling_params = SamplingParams(**getattr(engine, "sampling_defaults", {}))
    if isinstance(sampling_params, SamplingParams):
        sampling_params = [sampling_params] * len(prompts)
    if len(sampling_params) != len(prompts):
        raise ValueError(
            f"sampling_params has {len(sampling_params)} entries for {len(prompts)} prompts"
        )
    prepared = []
    for i, (prompt, params) in enumerate(zip(prompts, sampling_params, strict=True)):
        if isinstance(prompt, str) and engine.tokenizer is None:
            raise ValueError(f"prompts[{i}] is text, but this model has no tokenizer; give ids")
        if not isinstance(prompt, str | list | tuple):
            raise ValueError(f"prompts[{i}] must be text or token ids, not {shown(prompt)}")
        if params.n > max_n:
            raise ValueError(f"n must be at most {max_n} in this part, not {params.n}")
        check_options(params, prompt_logprobs)
        try:
            is_text = isinstance(prompt, str)
            token_ids = engine.tokenizer.encode(prompt) if is_text else list(prompt)
            check_prompt(token_ids, params, engine.max_model_len, engine.vocab_size)
        except ValueError as error:
            raise ValueError(f"prompts[{i}]: {error}") from None
        prepared.append((token_ids, params))
    return fan_out(prepared, **options)
